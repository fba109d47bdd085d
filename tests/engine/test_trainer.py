"""The training loop: what a run leaves, what resuming gives, and every kind of recipe it has to serve."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_method.recipe import LENGTH, Config, Numbers, Regression

from pyface.engine import Recipe, Trainer, load_config, load_weights
from pyface.errors import UserError

TESTS = Path(__file__).resolve().parent.parent
STEPS_PER_EPOCH = LENGTH // 8


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fit(folder, recipe=Regression, resume=False, **changes):
    return Trainer(recipe(recipe.Config.preset(**changes)), folder, resume=resume, quiet=True).fit()


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curve(folder):
    """log.csv without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "minutes"} for row in rows(folder / "log.csv")]


def assert_same(a, b):
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_differ(a, b):
    assert any(not torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_what_it_should(tmp_path):
    network = fit(tmp_path, ema=0.9, log_every=4, checkpoint_every=10)
    steps = 3 * STEPS_PER_EPOCH
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.toml", "log.csv", "validation.csv", "tensorboard", "checkpoints", "best-error.safetensors",
        "toy_method.safetensors",
    }  # fmt: skip
    log = rows(tmp_path / "log.csv")
    assert [int(row["step"]) for row in log] == list(range(4, steps + 1, 4))
    assert list(log[0]) == ["step", "epoch", "minutes", "lr", "loss", "progress", "norm", "skipped"]
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    # The mean of what the four steps saw: 0/24, 1/24, 2/24 and 3/24 of the way.
    assert float(log[0]["progress"]) == pytest.approx(1.5 / steps, abs=1e-5)
    validation = rows(tmp_path / "validation.csv")
    assert [int(row["step"]) for row in validation] == [8, 16, 24]
    assert [f.name for f in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000020", "step-00000024"]
    assert load_config(Config, file=tmp_path / "config.toml") == Config.preset(
        ema=0.9, log_every=4, checkpoint_every=10
    )
    best = min(validation, key=lambda row: float(row["error"]))
    other = Regression(Config.preset()).model()
    about = load_weights(other, tmp_path / "best-error.safetensors")
    assert about == {"method": "toy_method", "step": best["step"], "error": best["error"]}
    assert_same(network, other)
    assert not network.training
    assert Regression(Config.preset()).validate(network)[0]["error"] == pytest.approx(float(best["error"]), rel=1e-4)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, log_every=4)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    logged = {int(row["step"]): float(row["loss"]) for row in rows(tmp_path / "log.csv")}
    assert written == pytest.approx(logged, rel=1e-4)
    assert len(events.Scalars("validation/error")) == 3


def test_a_bare_loop_gives_the_same_weights(tmp_path):
    """Order, seeds and averaging say nothing if the arithmetic were another than PyTorch's."""

    class Plain(Regression):
        best = {}

        def schedulers(self, run):
            return []

        def order(self, epoch, length, rng):
            return range(length)

    trained = fit(tmp_path, Plain, noise=0.0, clip=0.5, epochs=2)
    from pyface.engine.sampling import seed_everything

    seed_everything(0, 0, 0)
    model = Plain(Config.preset()).model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-2)
    data = Numbers()
    for step in range(2 * STEPS_PER_EPOCH):
        first = step % STEPS_PER_EPOCH * 8
        x = data.x[first : first + 8]
        (model(x)[:, 0] - x.sum(1)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(trained, model)


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden": {"dropout": 0.3}, "ema": 0.9, "clip": 0.1}, {"precision": "fp16"}],
    ids=["plain", "all", "fp16"],
)
def test_resuming_gives_the_same_bits(tmp_path, changes):
    changes |= {"checkpoint_every": 5, "log_every": 3}

    class Stops(Regression):
        def step(self, run, batch):
            if run.step == 13:
                raise KeyboardInterrupt
            return super().step(run, batch)

    whole = fit(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", Stops, **changes)
    assert curve(tmp_path / "broken")[-1]["step"] == "12"
    assert_same(fit(tmp_path / "broken", resume=True, **changes), whole)
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    last = [load_file(tmp_path / run / "checkpoints/step-00000024/model.safetensors") for run in ("whole", "broken")]
    assert_same(*last)
    again = fit(tmp_path / "broken", resume=True, **changes)  # nothing left to do
    assert_same(again, whole)


def test_resuming_remembers_what_was_best(tmp_path):
    class Scripted(Regression):
        def on_epoch(self, run):
            self.epoch = run.epoch

        def validate(self, network):
            return [{"error": (1.0, 3.0, 2.0)[self.epoch]}]

    class Stops(Scripted):
        def step(self, run, batch):
            if run.step == 20:
                raise KeyboardInterrupt
            return super().step(run, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, Stops, checkpoint_every=0)
    assert [f.name for f in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000008", "step-00000016"]
    network = fit(tmp_path, Scripted, resume=True, checkpoint_every=0)
    assert load_weights(network, tmp_path / "toy_method.safetensors")["step"] == "8"


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from toy_method.recipe import Config, Regression
from pyface.engine import Trainer, checkpoint
folder, die_at, die_writing = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3])
write, written = checkpoint._write, []

def dying(path, content):
    written.append(path)
    if len(written) == die_writing:
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

checkpoint._write = dying
Trainer(
    Regression(Config.preset(checkpoint_every=5, log_every=3, ema=0.9, die_at=die_at)), folder, resume=True, quiet=True
).fit()
"""


def kill(folder, die_at, die_writing):
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", KILLED, folder, str(die_at), str(die_writing)], env=environment)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path):
    whole = fit(tmp_path / "whole", checkpoint_every=5, log_every=3, ema=0.9)
    broken = tmp_path / "broken"
    # Four files to a checkpoint: half of the second one's second file, written between steps 10 and 11.
    kill(broken, None, 6)
    names = sorted(path.name for path in (broken / "checkpoints").iterdir())
    assert names == [".step-00000010.partial", "step-00000005"]
    kill(broken, 17, None)
    assert [row["step"] for row in curve(broken)] == ["3", "6", "9", "12", "15"]
    resumed = fit(broken, resume=True, checkpoint_every=5, log_every=3, ema=0.9)
    assert_same(resumed, whole)
    assert curve(broken) == curve(tmp_path / "whole")
    assert rows(broken / "validation.csv")[-1]["error"] == rows(tmp_path / "whole" / "validation.csv")[-1]["error"]
    assert not list(broken.rglob("*.partial"))


def test_workers_change_nothing(tmp_path):
    one, two = (fit(tmp_path / str(workers), workers=workers, epochs=1) for workers in (0, 2))
    assert_same(one, two)


def test_seeds_change_everything(tmp_path):
    assert_differ(fit(tmp_path / "a", epochs=1), fit(tmp_path / "b", epochs=1, seed=1))


def test_accumulated_parts_are_one_batch(tmp_path):
    whole = fit(tmp_path / "whole", epochs=1, clip=1.0)
    parts = fit(tmp_path / "parts", epochs=1, clip=1.0, accumulate=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(curve(tmp_path / "whole"), curve(tmp_path / "parts"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
        assert float(a["norm"]) == pytest.approx(float(b["norm"]), rel=1e-4)


def test_a_run_may_be_prolonged_where_no_schedule_spans_it(tmp_path):
    class Constant(Regression):
        def schedulers(self, run):
            return []

    whole = fit(tmp_path / "whole", Constant, epochs=2)
    fit(tmp_path / "short", Constant, epochs=1)
    assert_same(fit(tmp_path / "short", Constant, resume=True, epochs=2), whole)
    fit(tmp_path / "scheduled", epochs=1)
    with pytest.raises(UserError, match="schedule was made for 8 steps"):
        fit(tmp_path / "scheduled", resume=True, epochs=2)


def test_time_ends_a_run(tmp_path):
    class Endless(Regression):
        def schedulers(self, run):
            return []

    fit(tmp_path, Endless, epochs=None, max_minutes=0.002)
    log = rows(tmp_path / "log.csv")
    assert 0.002 <= float(log[-1]["minutes"]) < 0.05
    assert float(log[-1]["progress"]) <= 1


# ----------------------------------------------------------------------------------------------------- kinds of recipes


class Adversarial(Regression):
    """A generator and a critic that take turns; only the generator is the result."""

    manual = True
    best = {}

    def model(self):
        return nn.ModuleDict({"made": super().model(), "critic": nn.Linear(1, 1)})

    def result(self, model):
        return model["made"]

    def optimizers(self, model):
        return {name: torch.optim.Adam(model[name].parameters(), 1e-2) for name in ("made", "critic")}

    def schedulers(self, run):
        return []

    def step(self, run, batch):
        made, critic = run.model["made"], run.model["critic"]
        fake, real = made(batch["x"]), batch["y"][:, None]
        deceived = -critic(fake).mean()
        run.backward(deceived, run.optimizers["made"])
        assert run.part or all(p.grad is None for p in critic.parameters())
        run.update(run.optimizers["made"])
        judged = (1 - critic(real)).relu().mean() + (1 + critic(fake.detach())).relu().mean()
        run.backward(judged)
        run.update(run.optimizers["critic"])
        assert all(p.grad is None for p in critic.parameters()) or run.part < run.config.accumulate - 1
        return {"deceived": deceived, "judged": judged}


def test_two_networks_take_turns(tmp_path):
    start = Adversarial(Config.preset()).model()
    network = fit(tmp_path / "a", Adversarial, epochs=2, ema=0.5, log_every=4)
    assert {"deceived", "judged", "norm_made", "norm_critic"} <= set(curve(tmp_path / "a")[0])
    assert set(load_file(tmp_path / "a" / "toy_method.safetensors")) == set(start["made"].state_dict())
    assert set(load_file(next((tmp_path / "a").rglob("model.safetensors")))) == set(start.state_dict())
    parts = fit(tmp_path / "b", Adversarial, epochs=2, ema=0.5, log_every=4, accumulate=2)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-3, atol=1e-4)


class Sharpness(torch.optim.SGD):
    """SAM (arXiv:2010.01412) on top of SGD: the gradient from a step of length rho uphill."""

    @torch.no_grad()
    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        for p in parameters:
            p.add_(p.grad, alpha=0.05 / norm.item())
        closure()
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        super().step()


class Sharp(Regression):
    manual = True
    best = {}

    def optimizers(self, model):
        return Sharpness(model.parameters(), 1e-2)

    def schedulers(self, run):
        return []

    def order(self, epoch, length, rng):
        return range(length)

    def step(self, run, batch):
        loss = self.loss(run.model, batch)
        run.backward(loss)
        run.update(run.optimizers["main"], lambda: self.loss(run.model, batch))
        return {"loss": loss}


def test_an_optimiser_may_look_twice(tmp_path):
    trained = fit(tmp_path / "run", Sharp, noise=0.0, epochs=1)
    from pyface.engine.sampling import seed_everything

    seed_everything(0, 0, 0)
    recipe = Sharp(Config.preset())
    model, data = recipe.model(), Numbers()
    optimizer = recipe.optimizers(model)
    for step in range(STEPS_PER_EPOCH):
        x = data.x[step * 8 : step * 8 + 8]

        def closure(x=x):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = (model(x)[:, 0] - x.sum(1)).square().mean()
                loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    assert_same(trained, model)
    with pytest.raises(UserError, match="set accumulate to 1"):
        fit(tmp_path / "parts", Sharp, accumulate=2)


class Addition(Regression):
    """A small trained addition to a frozen network with batch norm in it."""

    stores = "trainable"
    best = {}

    def model(self):
        torch.manual_seed(7)  # what a file would hold
        frozen = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).requires_grad_(False)
        return nn.Sequential(frozen, nn.BatchNorm1d(8), nn.Linear(8, 1))


def test_only_trained_parameters_are_stored(tmp_path):
    network = fit(tmp_path, Addition, epochs=2, ema=0.9)
    expected = {"2.weight", "2.bias", *(f"1.{n}" for n in dict(nn.BatchNorm1d(8).named_parameters()))}
    expected |= {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(load_file(tmp_path / "toy_method.safetensors")) == expected
    fresh = Addition(Config.preset()).model()
    load_weights(fresh, tmp_path / "toy_method.safetensors", "trainable")
    assert torch.equal(fresh[2].weight, network[2].weight)
    with pytest.raises(UserError, match="no value for '0"):
        load_weights(fresh, tmp_path / "toy_method.safetensors")


def test_a_recipe_may_make_its_own_batches(tmp_path):
    class Own(Regression):
        best = {}

        def data(self):
            return None

        def step(self, run, batch):
            assert batch is None
            x = torch.randn(run.config.batch_size, 4)[run.share(run.config.batch_size)]
            return {"loss": self.loss(run.model, {"x": x, "y": x.sum(1)})}

    fit(tmp_path / "run", Own, epochs=None, steps=30, log_every=10)
    log = rows(tmp_path / "run" / "log.csv")
    assert "epoch" not in log[0]
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    with pytest.raises(UserError, match="has no epochs; set steps"):
        fit(tmp_path / "epochs", Own)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_computes_in_it_and_keeps_float32(tmp_path, precision):
    seen = []

    class Watched(Regression):
        def step(self, run, batch):
            report = super().step(run, batch)
            seen.append(run.model[0](batch["x"]).dtype)
            return report

    network = fit(tmp_path, Watched, epochs=1, precision=precision, ema=0.9, clip=1.0)
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert network[0].weight.dtype == torch.float32
    full = fit(tmp_path / "full", epochs=1, ema=0.9, clip=1.0)
    assert float(curve(tmp_path)[-1]["norm"]) == pytest.approx(float(curve(tmp_path / "full")[-1]["norm"]), rel=0.2)
    # The scaler begins too high, finds out, and leaves those steps out.
    assert (int(curve(tmp_path)[-1]["skipped"]) > 0) == (precision == "fp16")
    torch.testing.assert_close(network[0].weight, full[0].weight, atol=0.05, rtol=0.1)


def test_on_epoch_and_order(tmp_path):
    told, seen = [], []

    class Part(Regression):
        def order(self, epoch, length, rng):
            return [(epoch + place) % length for place in range(16)]

        def on_epoch(self, run):
            told.append((run.epoch, run.step))

        def step(self, run, batch):
            seen.append(batch["index"].tolist())
            return super().step(run, batch)

    fit(tmp_path, Part, epochs=3)
    assert told == [(0, 0), (1, 2), (2, 4)]
    assert seen == [list(range(e + 8 * half, e + 8 * half + 8)) for e in range(3) for half in (0, 1)]


def test_averaged_weights_against_the_formula(tmp_path):
    history = []

    class Watched(Regression):
        best = {}

        def step(self, run, batch):
            history.append(run.model[0].weight.detach().clone())
            return super().step(run, batch)

    network = fit(tmp_path, Watched, epochs=1, ema=0.6)
    history.append(load_file(next(tmp_path.rglob("model.safetensors")))["0.weight"])
    average = history[0].double()
    for step, value in enumerate(history[1:], 1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value.double()
    torch.testing.assert_close(network[0].weight, average.float(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_steps_without_a_finite_gradient_are_skipped(tmp_path):
    class Poisoned(Regression):
        def step(self, run, batch):
            report = super().step(run, batch)
            if run.step in (2, 5):
                report["loss"] = report["loss"] * float("nan")
            return report

    network = fit(tmp_path, Poisoned, epochs=1, log_every=1)
    assert [row["skipped"] for row in curve(tmp_path)] == list("00111222")
    assert all(value.isfinite().all() for value in network.state_dict().values())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_run_that_diverged_says_so(tmp_path):
    class Hopeless(Regression):
        def step(self, run, batch):
            return {"loss": super().step(run, batch)["loss"] * float("inf")}

    with pytest.raises(UserError, match="training diverged.*lower lr"):
        fit(tmp_path, Hopeless, epochs=100)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    fit(tmp_path, epochs=1)
    with pytest.raises(UserError, match="holds a run already.*--resume"):
        fit(tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"other settings: lr \(0.03, now 0.1\), hidden.width \(8, now 9\);"):
        fit(tmp_path, resume=True, epochs=1, lr=0.1, hidden={"width": 9})

    class Other(Regression):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Config(Config):
            method = "other"

    with pytest.raises(UserError, match="holds settings of toy_method, expected other"):
        fit(tmp_path, Other, resume=True, epochs=1)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot use .* as the folder of a run"):
        fit(file)


def damage(checkpoint, name):
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    whole = fit(tmp_path, checkpoint_every=10, log_every=5)
    damage(tmp_path / "checkpoints" / "step-00000024", "optimizer.safetensors")
    with pytest.warns(UserWarning, match="checksum of optimizer.safetensors is wrong.*going on from step 20"):
        resumed = fit(tmp_path, resume=True, checkpoint_every=10, log_every=5)
    assert_same(resumed, whole)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{")
    with pytest.raises(UserError, match="no checkpoint can be read.*Start anew"):
        fit(tmp_path, resume=True, checkpoint_every=10, log_every=5)


def test_impossible_wishes(tmp_path):
    class Empty(Regression):
        def data(self):
            return []

    class Fickle(Regression):
        def order(self, epoch, length, rng):
            return range(16 + 8 * epoch)

    class Blind(Regression):
        best = {"accuracy": "max"}

    with pytest.raises(UserError, match="data set is empty"):
        fit(tmp_path / "empty", Empty)
    with pytest.raises(UserError, match="epoch 1 has 3 batches and epoch 0 has 2"):
        fit(tmp_path / "fickle", Fickle)
    with pytest.raises(UserError, match="no finite accuracy"):
        fit(tmp_path / "blind", Blind)
    with pytest.raises(UserError, match="batch of 8 cannot be shared evenly by 1 processes x 3"):
        fit(tmp_path / "uneven", accumulate=3)
    assert issubclass(Regression, Recipe)


def test_a_small_data_set_is_repeated_to_fill_a_batch(tmp_path):
    seen = []

    class Few(Regression):
        def order(self, epoch, length, rng):
            return [3, 1, 4]

        def step(self, run, batch):
            seen.append(batch["index"].tolist())
            return super().step(run, batch)

    fit(tmp_path, Few, epochs=2)
    assert seen == [[3, 1, 4, 3, 1, 4, 3, 1]] * 2
