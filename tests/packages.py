"""The archives of this checkout, made once per session, for the packaging tests and for who needs compiled modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory):
    """An environment in which importing torch fails, as it does in an isolated build.

    It asks for fast builds: nothing here depends on how well the compiler optimises, or for how many GPUs it does.
    """
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
    flags = f"{os.environ.get('CXXFLAGS', '')} -O0"
    return os.environ | {"PYTHONPATH": str(folder), "CXXFLAGS": flags, "PYFACE_CUDA_ARCHS": "90"}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory, without_torch):
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignored = shutil.ignore_patterns("build", "dist", ".*", "*.egg-info", "__pycache__", "*.so", "_build.json")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, source, env=without_torch)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def source(sdist):
    """The unpacked sdist: what a user without the repository builds from."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent / "unpacked", filter="data")
    (folder,) = (sdist.parent / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="session")
def _wheel(source, without_torch):
    out = source.parent / "wheel"
    log = run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, source),
        env=without_torch,
    )
    (archive,) = out.glob("*.whl")
    return archive, log


@pytest.fixture(scope="session")
def wheel(_wheel):
    return _wheel[0]


@pytest.fixture(scope="session")
def wheel_log(_wheel):
    return _wheel[1]
