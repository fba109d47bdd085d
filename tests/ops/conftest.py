"""Shared by the op tests."""

from __future__ import annotations

import pytest

from pyface.ops import _paths

CPU = _paths.load_module("_cpu")[0]


@pytest.fixture(params=CPU.isas())
def isa(request):
    """Every instruction set of this machine in turn."""
    before = CPU.isa()
    CPU.set_isa(request.param)
    yield request.param
    CPU.set_isa(before)
