"""The process and its machine: files, paths, progress, signals, cores, versions."""
