"""``pyface train`` and ``pyface evaluate`` as a user meets them, for any method there is."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pyface.cli.main import app
from pyface.methods import _registry
from pyface.methods.proface_s.model import ProFaceS

TESTS = Path(__file__).resolve().parent.parent
TINY = ("--preset", "tiny", "--data", "procedural", "--set", "scenes=4", "--set", "validation_size=16",
        "--set", "workers=0", "--set", "scene_size=64", "--set", "stages=[[1.0, 16, 1.0]]")  # fmt: skip


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """An empty folder, and a method that is small enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(_registry._MODULES, "toy_method", "toy_method")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def pyface(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="pyface")


def ok(*args):
    result = pyface(*args)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*args):
    result = pyface(*args)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    return result.output


def test_any_method_trains_and_is_evaluated(desk):
    trained = json.loads(ok("train", "toy_method", "--preset", "tiny", "--json"))
    run = Path("runs/toy_method")
    assert trained["weights"] == str(run / "toy_method.safetensors")
    evaluated = json.loads(ok("evaluate", "toy_method", "--weights", run, "--json", "--csv", "table.csv"))
    assert evaluated["evaluation"] == trained["evaluation"]
    with open("table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["error"]) == trained["evaluation"][0]["error"]
    # The run's folder says how wide the layer is; a file of weights does not.
    assert "hidden" not in refused("evaluate", "toy_method", "--weights", run, "--csv", "table.csv")
    assert "does not fit" in refused("evaluate", "toy_method", "--weights", run / "toy_method.safetensors")
    text = ok("evaluate", "toy_method", "-w", run / "toy_method.safetensors", "--preset", "tiny")
    assert "error" in text
    assert "toy_method.safetensors" in text


def test_resume_must_be_said_and_keeps_the_settings(desk):
    ok("train", "toy_method", "--preset", "tiny", "--set", "checkpoint_every=3", "-o", "run")
    assert "holds a run already; go on with it by --resume" in refused("train", "toy_method", "-o", "run")
    first = Path("run/config.toml").read_text()
    ok("train", "toy_method", "-o", "run", "--resume")
    assert Path("run/config.toml").read_text() == first
    assert "other settings: seed (0, now 5)" in refused("train", "toy_method", "-o", "run", "--resume", "--seed", "5")
    assert "hidden.width (3, now 8)" in refused("train", "toy_method", "-o", "run", "--resume", "--preset", "default")
    ok("train", "toy_method", "-o", "fresh", "--resume", "--preset", "tiny")
    with open("run/toy_method.safetensors", "rb") as a, open("fresh/toy_method.safetensors", "rb") as b:
        assert a.read() == b.read()


def test_show_config_can_be_fed_back(desk):
    text = ok("train", "toy_method", "--set", "hidden.width=5", "--seed", "3", "--show-config")
    assert "# units\nwidth = 5" in text
    assert not Path("runs").exists()
    Path("mine.toml").write_text(text)
    assert ok("train", "toy_method", "--config", "mine.toml", "--show-config") == text
    Path("photos").mkdir()
    there = json.dumps(str(desk.resolve() / "photos"))  # so that the run can be resumed from anywhere
    assert f"data = {there}\n" in ok("train", "proface_s", "--data", "photos", "--show-config")


def test_mistakes_are_one_line(desk):
    assert "did you mean 'proface_s'" in refused("train", "proface")
    assert "did you mean 'toy_method'" in refused("evaluate", "toymethod")
    assert "did you mean 'tiny'" in refused("train", "proface_s", "--preset", "tinny")
    assert "did you mean 'batch_size'" in refused("train", "proface_s", "--set", "batchsize=3")
    assert "did you mean 'paper'" in refused("evaluate", "proface_s", "--preset", "papr")
    assert "is not a folder; --data takes" in refused("train", "proface_s", "--data", "nowhere")
    assert "steps must be positive" in refused("train", "proface_s", "--steps", "0")
    assert "cannot read mine.toml" in refused("train", "toy_method", "--config", "mine.toml")
    Path("mine.toml").write_text("learning_rate = 1\nlr = 2")
    assert "unknown setting 'learning_rate'" in refused("train", "toy_method", "--config", "mine.toml")
    assert "no weights of toy_method ship" in refused("evaluate", "toy_method")
    Path("empty").mkdir()
    assert "not the folder of a run" in refused("evaluate", "toy_method", "--weights", "empty")
    Path("empty/config.toml").write_text("")
    assert "holds a run that has not ended; go on with it" in refused("evaluate", "toy_method", "-w", "empty")
    assert "cannot read absent.safetensors" in refused("evaluate", "toy_method", "-w", "absent.safetensors")


def test_a_method_without_recipe_is_explained(desk, monkeypatch):
    package = desk / "no_recipe"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pyface.methods import register_model\nregister_model('no_recipe', None, None)\n"
    )
    monkeypatch.syspath_prepend(desk)
    monkeypatch.setitem(_registry._MODULES, "no_recipe", "no_recipe")
    assert "no_recipe has no recipe" in refused("train", "no_recipe")
    _registry._MODELS.pop("no_recipe")


def test_a_killed_run_goes_on_with_resume(desk):
    """What the issue asks to be shown, at a size for tests."""
    code = (
        "import os, signal, sys\n"
        "from pyface.methods.proface_s import recipe\n"
        "from pyface.cli.main import run\n"
        "step = recipe.Recipe.step\n"
        "def dying(self, run, batch):\n"
        "    if run.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, run, batch)\n"
        "recipe.Recipe.step = dying\n"
        "run()\n"
    )
    train = ["train", "proface_s", *TINY, "--steps", "8", "--set", "checkpoint_every=3"]
    killed = subprocess.run(
        [sys.executable, "-c", code, *train, "--out", "broken"], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in Path("broken/checkpoints").iterdir()] == ["step-00000003"]
    ok("train", "proface_s", "--out", "broken", "--resume")
    ok(*train, "--out", "whole")
    one, two = (load_file(f"{run}/proface_s.safetensors") for run in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    ProFaceS().load_state_dict(one)


def test_shipped_weights_are_evaluated(desk):
    found = json.loads(ok("evaluate", "proface_s", "--set", "validation_size=64", "--json"))
    assert len(found["evaluation"]) == 15
    assert found["weights"].endswith("weights/proface_s.safetensors")
    assert min(row["recovered"] for row in found["evaluation"]) > 30
