"""Losses between image and text embeddings, and the exchange between ranks; pure torch."""

from siglit.loss.composition import Negatives
from siglit.loss.memory import LossMemory, memory_bytes
from siglit.loss.module import SigLipLoss
from siglit.loss.sigmoid import sigmoid_loss
from siglit.loss.softmax import softmax_loss

__all__ = ["LossMemory", "Negatives", "SigLipLoss", "memory_bytes", "sigmoid_loss", "softmax_loss"]
