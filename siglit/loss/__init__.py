"""Losses between image and text embeddings, and the exchange between ranks; pure torch."""

from siglit.loss.sigmoid import sigmoid_loss

__all__ = ["sigmoid_loss"]
