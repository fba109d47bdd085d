"""Drop-in layers on top of `pyface.ops`."""

from pyface.nn.attention import ConcatKVAttention, ExtraKV
from pyface.nn.coupling import AffineCoupling, HaarDWT2d, InvertibleSequential
from pyface.nn.deform_conv import DeformConv2d, ModulatedDeformConv2d, replace_deform_conv
from pyface.nn.spectral import MaskedFrequency, SpectralFilter

__all__ = [
    "AffineCoupling",
    "ConcatKVAttention",
    "DeformConv2d",
    "ExtraKV",
    "HaarDWT2d",
    "InvertibleSequential",
    "MaskedFrequency",
    "ModulatedDeformConv2d",
    "SpectralFilter",
    "replace_deform_conv",
]
