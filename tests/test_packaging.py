"""The archives hold what they should, build without torch, and rebuild only what changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from packages import ROOT, run

HAS_NVCC = shutil.which("nvcc") is not None


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for needed in ["setup.py", "pyproject.toml", "LICENSE", "README.md", "pyface/py.typed", "csrc/cpu/coupling.cpp"]:
        assert needed in names
    for needed in ["csrc/include/pyface/coupling.h", "csrc/cuda/coupling.cu", "kernels/coupling.py"]:
        assert needed in names
    assert "tests/ops/test_coupling.py" in names
    assert not [name for name in names if name.endswith((".so", "_build.json")) or "__pycache__" in name]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("pyface/_build.json"))
    assert {name.split("/")[0] for name in names} == {"pyface", f"{wheel.name.split('-cp')[0]}.dist-info"}
    assert [name for name in names if name.startswith("pyface/_cpu.")]
    for needed in ["pyface/py.typed", "pyface/kernels/coupling.py", "pyface/ops/coupling.py"]:
        assert needed in names
    for method in (ROOT / "pyface" / "methods").glob("*/card.md"):
        assert f"pyface/methods/{method.parent.name}/card.md" in names
    for weights in (ROOT / "pyface" / "weights").glob("*.safetensors"):
        assert f"pyface/weights/{weights.name}" in names
    assert any(name.endswith("licenses/LICENSE") or name.endswith("dist-info/LICENSE") for name in names)
    assert record["cpu"]["built"]
    if HAS_NVCC:
        assert record["cuda"]["built"], record["cuda"]
        assert [name for name in names if name.startswith("pyface/_cuda.")]
    else:
        assert "nvcc not found" in record["cuda"]["reason"]


def test_no_compiler_has_anything_to_say(wheel_log):
    assert "pyface: _cpu built (" in wheel_log  # the one line at the end of a build
    complaints = re.findall(r".*(?:\.(?:cpp|cu|h)\b.*warning|(?:nvcc|nvlink|ptxas)\s.*warning).*", wheel_log)
    assert not complaints


def test_modules_link_neither_torch_nor_cuda_libraries(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path, modules)
    for module in modules:
        needed = run("readelf", "-d", tmp_path / module)
        libraries = [line for line in needed.splitlines() if "NEEDED" in line]
        assert libraries
        assert not [line for line in libraries if any(word in line for word in ("torch", "c10", "cuda", "python"))]


def test_rebuild_is_incremental_and_follows_headers(source, wheel, without_torch):
    """Runs after the wheel was built in the same folder, so every object is there."""
    environment = without_torch | {"PYFACE_CUDA": "off"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run(*build, cwd=source, env=environment)
    objects = {path: path.stat().st_mtime_ns for path in (source / "build").glob("ninja-*/cpu/*.o")}
    assert len(objects) >= 2
    run(*build, cwd=source, env=environment)
    assert {path: path.stat().st_mtime_ns for path in objects} == objects
    os.utime(source / "csrc" / "cpu" / "coupling.h")  # a header that the bindings and the coupling core include
    run(*build, cwd=source, env=environment)
    rebuilt = {path.name for path, stamp in objects.items() if path.stat().st_mtime_ns != stamp}
    assert "bindings.o" in rebuilt
    assert {name for name in rebuilt if name.startswith("coupling.")} == {
        path.name for path in objects if path.name.startswith("coupling.")
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PYFACE_CUDA": "maybe"}, "PYFACE_CUDA='maybe' is not known: use auto, off or required"),
        ({"PYFACE_CUDA": "required", "PYFACE_NVCC": "/nowhere/nvcc"}, "PYFACE_NVCC=/nowhere/nvcc does not run"),
        ({"PYFACE_CUDA": "required", "PYFACE_CUDA_ARCHS": "hopper"}, "PYFACE_CUDA_ARCHS='hopper' is not a list like"),
    ],
    ids=["unknown", "no nvcc", "bad archs"],
)
def test_build_errors_say_what_to_do(source, wheel, without_torch, settings, message):
    if "PYFACE_CUDA_ARCHS" in settings and not HAS_NVCC:
        pytest.skip("nvcc is not installed: the architectures are only read when it is")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env=without_torch | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_a_failing_cuda_part_leaves_the_cpu_part(source, wheel, without_torch):
    log = run(
        *(sys.executable, "setup.py", "build_ext", "--inplace"),
        cwd=source,
        env=without_torch | {"PYFACE_NVCC": "/nowhere/nvcc"},
    )
    assert "_cuda not built: PYFACE_NVCC=/nowhere/nvcc does not run" in log
    assert list((source / "pyface").glob("_cpu.*.so"))
