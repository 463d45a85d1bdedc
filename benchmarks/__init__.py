"""Speed and memory against peers: `python -m benchmarks.NAME --json FILE` from the repository root."""
