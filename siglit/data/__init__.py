"""From files to samples, and from caches to batches."""
