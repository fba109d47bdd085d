"""Drop-in layers on top of `pyface.ops`."""

from pyface.nn.coupling import AffineCoupling, HaarDWT2d, InvertibleSequential

__all__ = ["AffineCoupling", "HaarDWT2d", "InvertibleSequential"]
