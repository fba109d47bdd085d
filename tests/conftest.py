"""Shared by all tests: seeds, skips for what the machine lacks, and the error measures."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

pytest_plugins = ["packages"]

@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="session")
def _elsewhere(tmp_path_factory):
    """Run outside the checkout: a child process must import the installed package, not the sources beside it."""
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(here)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
