"""The ops: fused kernels with plain-PyTorch twins, automatic or explicit choice of path, and full torch integration.

Every op takes and returns ordinary tensors, works under autograd, forward mode, vmap, autocast, `torch.compile` and
`torch.export`, and is registered as `torch.ops.pyface.*`. `dense_block` is for inference: it has no gradient.
"""

from pyface.ops._paths import PATHS, PathError, paths, table
from pyface.ops.attention import concat_kv_attention, spatial_prior_attention
from pyface.ops.coupling import affine_coupling, haar_dwt2d, haar_idwt2d
from pyface.ops.deform_conv import deform_conv2d
from pyface.ops.dense_block import dense_block
from pyface.ops.sharpness import (
    multi_combine,
    multi_combine_,
    multi_dots,
    multi_norm,
    multi_step_,
    perturb,
    perturb_,
    restore_,
)
from pyface.ops.spectral import high_pass, mask_high_frequencies, spectral_filter

__all__ = [
    "PATHS",
    "PathError",
    "affine_coupling",
    "concat_kv_attention",
    "deform_conv2d",
    "dense_block",
    "haar_dwt2d",
    "haar_idwt2d",
    "high_pass",
    "mask_high_frequencies",
    "multi_combine",
    "multi_combine_",
    "multi_dots",
    "multi_norm",
    "multi_step_",
    "paths",
    "perturb",
    "perturb_",
    "restore_",
    "spatial_prior_attention",
    "spectral_filter",
    "table",
]
