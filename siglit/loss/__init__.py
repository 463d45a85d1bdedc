"""Losses between image and text embeddings, and the exchange between ranks; pure torch."""

from siglit.loss.composition import Negatives
from siglit.loss.module import SigLipLoss
from siglit.loss.sigmoid import sigmoid_loss
from siglit.loss.softmax import softmax_loss

__all__ = ["Negatives", "SigLipLoss", "sigmoid_loss", "softmax_loss"]
