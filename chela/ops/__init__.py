"""Pure functions on tensors, one folder per op."""

from chela.ops.backend import backends

__all__ = ["backends"]
