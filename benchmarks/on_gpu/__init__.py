"""All that one GPU must show, a module for each part; `python -m benchmarks.on_gpu` runs them."""
