"""``accelerate launch`` with two CPU processes does what one process does with the same global batch."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_method.recipe import Regression

from pyface.engine import Trainer
from pyface.engine.run import processes

TESTS = Path(__file__).resolve().parent.parent
SCRIPT = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from toy_method.recipe import Regression
from pyface.engine import Trainer, run

class Odd(Regression):
    '''One process alone uses one of the parameters, and no process uses another.'''

    def model(self):
        model = torch.nn.ModuleDict({"all": super().model()})
        rank = float(os.environ["RANK"])  # processes must agree on the first one's initial weights
        model.some, model.none = (torch.nn.Parameter(torch.ones(()) + rank) for _ in range(2))
        return model

    def step(self, run, batch):
        assert run.step or (run.model.some == 1 and run.model.none == 1)
        loss = self.loss(run.model["all"], batch)
        if 7 in batch["index"]:
            loss = loss + run.model.some.square()
        return {"loss": loss}

    def validate(self, network):
        return super().validate(network["all"])

class Stops(Regression):
    def step(self, run, batch):
        if run.step == 13:
            raise KeyboardInterrupt
        return super().step(run, batch)

def fit(folder, recipe=Regression, **changes):
    Trainer(recipe(recipe.Config.preset(**CHANGES | changes)), folder, resume=True).fit()

CHANGES = {"clip": 1.0, "ema": 0.9, "log_every": 3}
home = Path(sys.argv[1])
fit(home / "two")
fit(home / "odd", Odd)
try:
    fit(home / "resumed", Stops, checkpoint_every=5)
except KeyboardInterrupt:
    fit(home / "resumed", checkpoint_every=5)
run._average = lambda parameters: None
fit(home / "apart", epochs=1)
from pyface.cli.main import app
from pyface.methods import _registry
_registry._MODULES["toy_method"] = "toy_method"
app(["train", "toy_method", "--preset", "tiny", "--out", str(home / "command"), "--json"], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    home = tmp_path_factory.mktemp("launched")
    script = home / "script.py"
    script.write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, script, home],
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return home, done


def alone(folder, **changes):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {"clip": 1.0, "ema": 0.9, "log_every": 3} | changes
    Trainer(Regression(Regression.Config.preset(**settings)), folder, quiet=True).fit()
    torch.set_num_threads(before)


def curve(folder, file="log.csv"):
    with open(folder / file, newline="") as opened:
        return [{k: float(v) for k, v in row.items() if k != "minutes"} for row in csv.DictReader(opened)]


def largest_difference(a, b):
    a, b = (load_file(folder / "toy_method.safetensors") for folder in (a, b))
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_same_curve_and_weights(launched, tmp_path):
    home, _ = launched
    alone(tmp_path / "one")
    for file in ("log.csv", "validation.csv"):
        for a, b in zip(curve(tmp_path / "one", file), curve(home / "two", file), strict=True):
            assert a == pytest.approx(b, rel=1e-4), (file, a, b)
    assert largest_difference(tmp_path / "one", home / "two") < 1e-5


def test_without_averaging_they_differ(launched, tmp_path):
    """The test above would notice gradients that stay at home."""
    home, _ = launched
    alone(tmp_path / "one", epochs=1)
    assert largest_difference(tmp_path / "one", home / "apart") > 1e-3


def test_parameters_that_not_every_process_uses(launched):
    """One that any process used moves; one that none used has no gradient, and so no weight decay either."""
    home, _ = launched
    weights = load_file(sorted((home / "odd" / "checkpoints").iterdir())[-1] / "model.safetensors")
    assert weights["none"] == 1
    assert weights["some"] < 0.999


def test_resuming_gives_the_same_bits(launched):
    home, _ = launched
    assert largest_difference(home / "two", home / "resumed") == 0
    assert curve(home / "two") == curve(home / "resumed")


def test_the_launcher_that_starts_one_process_is_noticed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.warns(UserWarning, match="starts one process only.*--multi_gpu --num_processes N"):
        processes()


def test_only_the_first_process_writes(launched):
    home, done = launched
    assert sorted(path.name for path in (home / "two").iterdir()) == [
        "best-error.safetensors", "checkpoints", "config.toml", "log.csv", "tensorboard", "toy_method.safetensors",
        "validation.csv",
    ]  # fmt: skip
    assert len(list((home / "two" / "tensorboard").iterdir())) == 1
    assert json.loads(done.stdout)["evaluation"]  # of the command; a second one would not be JSON any more
    assert "warning" not in done.stderr.lower()
