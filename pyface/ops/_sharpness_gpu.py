"""The two GPU paths of core `sharpness`: where their tables go and who runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyface.ops.sharpness import Compiled, Listed


class Cuda(Compiled):
    """The core of the compiled module `pyface._cuda`: hands over addresses."""

    def __init__(self, module):
        super().__init__(module, 2)

    def where(self, some: Tensor) -> tuple[int, ...]:
        return some.device.index, torch.cuda.current_stream(some.device).cuda_stream

    def call(self, name, read, some, *arguments):
        if name == "sums":
            scratch = some.new_empty(self.module.sharpness_scratch(read), dtype=torch.uint8)
            arguments += (scratch.data_ptr(),)
        super().call(name, read, some, *arguments)


class Triton(Listed):
    """The kernels of `pyface.kernels.sharpness`."""

    def __init__(self, module):
        self.module = module

    def run(self, name, lists, *arguments):
        getattr(self.module, name)(lists, *arguments)
