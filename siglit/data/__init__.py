"""Samples from files, and training batches from images or a cache."""
