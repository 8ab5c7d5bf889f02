"""The arithmetic of a step, in PyTorch (`plain`) and in C (`compiled`, `native.c`), equal bit for bit."""

from resq_rl.quantization.kernels.compiled import native
from resq_rl.quantization.kernels.plain import PLAIN, Choice, Kernels, Product

__all__ = ["PLAIN", "Choice", "Kernels", "Product", "native"]
