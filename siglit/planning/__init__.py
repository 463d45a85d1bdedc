"""What a training run needs, estimated before it starts: memory and throughput."""
