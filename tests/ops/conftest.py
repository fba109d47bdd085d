"""Shared by the op tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

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


@pytest.fixture
def sanitized(tmp_path):
    """Runs a core's program, <core>_sanitized.cpp, under AddressSanitizer and UBSan: it must print "ok" and no more.

    Flags are the compiler's; the instruction set is the best of this machine that the core has a build for.
    """
    cxx = os.environ.get("CXX", "g++").split()
    if shutil.which(cxx[-1]) is None:
        pytest.skip("no C++ compiler (CXX or g++)")

    def run(core: str, *flags: str, isa: str | None = None):
        here, program = Path(__file__).parent, tmp_path / core
        csrc = here.parents[1] / "csrc"
        isa = isa or [name for name in CPU.isas() if name != "amx"][-1]
        command = [
            *cxx, "-std=c++17", "-O0", "-g1", "-march=native", f"-DPYFACE_ISA={isa}",
            "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-ignored-attributes", *flags,
            "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{csrc}", f"-I{csrc / 'include'}",
            csrc / "cpu" / f"{core}.cpp", here / f"{core}_sanitized.cpp", "-o", program,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        done = subprocess.run([program], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr[-4000:]

    return run
