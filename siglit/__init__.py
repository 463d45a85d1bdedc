"""SigLiT: sigmoid-loss locked-image tuning from cached image embeddings (arXiv:2303.15343)."""

__version__ = "0.1.0"
