"""What Lightning trains: module, data, optimizer, callbacks and checkpoint files; the only home of its internals."""
