"""The process and its machine: files, paths, progress, signals, cores, versions. Knows nothing of siglit's data."""
