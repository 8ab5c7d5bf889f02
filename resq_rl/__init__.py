"""Learned bit allocation for residual-quantized video perception."""

__version__ = "0.1.0"
