"""The two GPU paths of core `sharpness`: where their tables go and who runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyface.ops.sharpness import Listed, table


class Cuda(Listed):
    """The core of the compiled module `pyface._cuda`: hands over addresses."""

    def __init__(self, module):
        self.module = module

    def where(self, t: Tensor) -> tuple[int, int]:
        return t.device.index, torch.cuda.current_stream(t.device).cuda_stream

    def run(self, name, lists, *arguments):
        addresses = table(lists)
        some = next(filter(None, lists))[0]
        arguments = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        if name == "sums":
            scratch = some.new_empty(self.module.sharpness_scratch(addresses), dtype=torch.uint8)
            arguments.append(scratch.data_ptr())
        getattr(self.module, f"sharpness_{name}")(addresses, *arguments, *self.where(some))


class Triton(Listed):
    """The kernels of `pyface.kernels.sharpness`."""

    def __init__(self, module):
        self.module = module

    def run(self, name, lists, *arguments):
        getattr(self.module, name)(lists, *arguments)
