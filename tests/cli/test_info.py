from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pyface
from pyface.cli import info
from pyface.cli.main import app

ROOT = Path(__file__).resolve().parents[2]


def shown(*words: str, **variables: str) -> str:
    """What `pyface info` prints into a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "pyface", "info", *words],
        capture_output=True, text=True, check=True, env=os.environ | variables,
    ).stdout  # fmt: skip


def test_json_is_one_document_with_every_part():
    found = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)
    assert set(found) == {
        "machine", "versions", "build", "openmp", "paths", "weights", "environment", "warnings"
    }  # fmt: skip
    machine, versions = found["machine"], found["versions"]
    assert machine["cores_allowed"] >= 1
    assert machine["cpu"]
    assert isinstance(machine["gpus"], list)
    assert versions["pyface"] == pyface.__version__
    assert versions["torch"] == __import__("torch").__version__
    assert found["environment"].keys() == info.VARIABLES.keys()


def test_isa_in_use_is_one_of_the_machines():
    machine = info.collect()["machine"]
    if not machine["isas"]:
        pytest.skip("the CPU module is not built")
    assert machine["isa_in_use"] in machine["isas"]


def test_every_path_has_a_state_and_a_reason():
    rows = info.collect()["paths"]
    assert {row["path"] for row in rows if row["core"] == "coupling"} == {"reference", "cpu", "triton", "cuda"}
    for row in rows:
        assert row["usable"] == (not row["reasons"])
        assert row["dtypes"]


def test_weights_are_told_by_their_digest():
    from importlib.resources import files

    weights = {row["file"]: row for row in info.collect()["weights"]}
    assert "proface_s.safetensors" in weights
    content = (files("pyface") / "weights" / "proface_s.safetensors").read_bytes()
    assert weights["proface_s.safetensors"]["sha256"] == hashlib.sha256(content).hexdigest()


def test_text_fits_a_pipe_and_names_everything():
    text = shown()
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    for words in ("Machine", "Versions", "Build", "cuda module", "OpenMP", "proface_s.safetensors", "Compute paths"):
        assert words in text
    for row in info.collect()["paths"]:
        assert re.search(rf"{row['core']} +{row['path']} +{'works' if row['usable'] else 'not here'}", text)


def test_missing_cuda_module_is_explained():
    found = info.collect()
    cuda = next(row for row in found["paths"] if row["path"] == "cuda")
    if cuda["usable"]:
        pytest.skip("the CUDA path works here")
    if found["build"] and not found["build"]["cuda"]["built"]:
        assert found["build"]["cuda"]["reason"] in " ".join(cuda["reasons"])


def test_environment_is_shown_but_no_password():
    text = shown("--json", PYFACE_PASSWORD="open sesame", PYFACE_PATH="reference")
    environment = json.loads(text)["environment"]
    assert "sesame" not in text
    assert environment["PYFACE_PASSWORD"] == "(set, not shown)"
    assert environment["PYFACE_PATH"] == "reference"


def test_a_wrong_isa_is_a_warning_not_a_crash():
    found = json.loads(shown("--json", PYFACE_CPU_ISA="nonsense"))
    if "was not built" in " ".join(found["warnings"]):
        pytest.skip("the CPU module is not built")
    assert "PYFACE_CPU_ISA" in " ".join(found["warnings"])
    assert not next(row for row in found["paths"] if row["path"] == "cpu")["usable"]


def test_two_openmp_runtimes_are_a_warning():
    assert info._warnings(None, ["/a/libgomp.so.1"], True) == []
    (warning,) = info._warnings(None, ["/a/libgomp.so.1", "/b/libiomp5.so"], True)
    assert "libiomp5.so" in warning
    (warning,) = info._warnings(None, [], False)
    assert "without OpenMP" in warning


def test_openmp_runtimes_are_read_from_the_process():
    import torch

    torch.ones(4)
    runtimes = info.openmp_runtimes()
    if sys.platform == "linux":
        assert runtimes
        assert all(Path(name).is_absolute() for name in runtimes)


def test_every_variable_in_the_sources_is_listed():
    """The list of environment variables is complete and has nothing that nobody reads."""
    sources = [ROOT / "setup.py", *(ROOT / "pyface").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    read = set()
    for file in sources:
        if file != Path(info.__file__):
            read |= set(re.findall(r"\bPYFACE_[A-Z_]+\b", file.read_text(encoding="utf-8")))
    read -= {"PYFACE_ISA"}  # a macro of the C++ build
    assert read == {name for name in info.VARIABLES if name.startswith("PYFACE_")}


def test_a_package_that_was_never_built_is_described(monkeypatch):
    assert info._build_rows({}) == [("record", "none: pyface runs from its source; install it with pip install .")]
    rows = dict(
        info._build_rows(
            {"python": "3.12.1", "platform": "linux-x86_64", "git": None,
             "cpu": {"built": True, "isas": ["baseline"], "compiler": "g++", "flags": "-O3"},
             "cuda": {"built": True, "archs": "80;90", "nvcc": "V13"}}
        )
    )  # fmt: skip
    assert rows["cuda module"] == "built for sm_80, sm_90"
    assert rows["source"] == "not a git checkout"
