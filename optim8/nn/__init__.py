"""Modules that are made for training with 8-bit state."""

from optim8.nn.embedding import StableEmbedding

__all__ = ["StableEmbedding"]
