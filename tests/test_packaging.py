"""The archives hold what they should, build without torch, and rebuild only what changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HAS_NVCC = shutil.which("nvcc") is not None


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """An environment in which importing torch fails, as it does in an isolated build."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, without_torch):
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignored = shutil.ignore_patterns("build", "dist", ".*", "*.egg-info", "__pycache__", "*.so", "_build.json")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, source, env=without_torch)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def source(sdist):
    """The unpacked sdist: what a user without the repository builds from."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent / "unpacked", filter="data")
    (folder,) = (sdist.parent / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(source, without_torch):
    out = source.parent / "wheel"
    log = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, source),
        env=without_torch,
    )
    assert "pyface: _cpu built (" in log  # the one line at the end of a build
    (archive,) = out.glob("*.whl")
    return archive


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
