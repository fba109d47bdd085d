"""The optimisers as people train with them: processes, accumulation, schedulers, autocast, accelerate, engine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from pyface.optim import GSAM, SAM, GradientConstrainedSAM

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
STEPS, BATCH = 5, 8
KINDS = {"sam": SAM, "gsam": GSAM, "constrained": GradientConstrainedSAM}


def network(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


def batch(i, dtype=torch.float64):
    g = torch.Generator().manual_seed(100 + i)
    return torch.randn(BATCH, 4, generator=g, dtype=dtype), torch.randn(BATCH, 2, generator=g, dtype=dtype)


def fit(model, optimizer, steps=STEPS, mine=slice(None), after=lambda: None):
    for i in range(steps):
        x, y = (t[mine] for t in batch(i))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        after()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


# ---- two processes ------------------------------------------------------------------------------------------------


def in_process(rank: int, folder: str) -> dict:
    """Trains on this rank's half of each batch; (weights, buckets reduced) of each kind."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    try:
        results = {}
        for name, kind in KINDS.items():
            for view in (False, True):
                reduced = []

                def hook(group, bucket, reduced=reduced):
                    reduced.append(bucket.buffer().numel())
                    return allreduce_hook(group, bucket)

                model = nn.parallel.DistributedDataParallel(network(), gradient_as_bucket_view=view)
                model.register_comm_hook(None, hook)
                fit(model, kind(model.parameters(), torch.optim.SGD, rho=0.3, **SGD), mine=slice(rank, None, 2))
                results[name, view] = weights(model), sum(reduced)
        return results
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_equal_one_on_the_joint_batch(tmp_path):
    child = subprocess.Popen([sys.executable, __file__, str(tmp_path)], stderr=subprocess.PIPE)
    try:
        mine = in_process(0, str(tmp_path))
        errors = child.communicate(timeout=300)[1].decode()
    finally:
        child.kill()
    assert child.returncode == 0, errors
    theirs = torch.load(tmp_path / "results.pt")
    for (name, view), (trained, reduced) in mine.items():
        alone = network()
        fit(alone, KINDS[name](alone.parameters(), torch.optim.SGD, rho=0.3, **SGD))
        close(trained, weights(alone))
        assert all(torch.equal(a, b) for a, b in zip(trained, theirs[name, view][0], strict=True))  # the ranks agree
        assert reduced == 2 * STEPS * sum(p.numel() for p in alone.parameters())  # once in each of the two passes


# ---- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values())
def test_accumulated_parts_equal_the_batch(kind):
    whole, parts = network(), network()
    fit(whole, kind(whole.parameters(), torch.optim.SGD, rho=0.3, **SGD))
    optimizer = kind(parts.parameters(), torch.optim.SGD, rho=0.3, **SGD)
    for i in range(STEPS):
        x, y = batch(i)

        def all_parts(x=x, y=y):
            for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
                ((parts(a) - b).square().mean() / 4).backward()

        all_parts()
        optimizer.first_step(zero_grad=True)
        all_parts()
        optimizer.second_step(zero_grad=True)
    close(weights(parts), weights(whole))


# ---- schedulers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("style", ["closure", "two calls"])
def test_schedulers(on_base, base, style):
    """On the optimiser or on its base, with no warning of a wrong order, and with the right rates."""
    model = network()
    optimizer = SAM(model.parameters(), base, rho=0.1, lr=0.08)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.base_optimizer if on_base else optimizer, 4)
        for i in range(4):
            x, y = batch(i)

            def backward(x=x, y=y):
                (model(x) - y).square().mean().backward()

            optimizer.zero_grad()
            backward()
            if style == "closure":
                optimizer.step(backward)
            else:
                optimizer.first_step()
                backward()
                optimizer.second_step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(0)
    before = weights(model)
    fit(model, optimizer, 1)  # with rate 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_a_schedule_of_rho_and_alpha():
    """GSAM's own: rho follows lr."""
    a, b = network(), network()
    optimizer = GSAM(a.parameters(), torch.optim.SGD, rho=0.5, alpha=0.1, **SGD)
    for group in optimizer.param_groups:
        group["rho"] = 0.05
    optimizer.rule_parameters["alpha"] = 0.4
    fit(a, optimizer)
    fit(b, GSAM(b.parameters(), torch.optim.SGD, rho=0.05, alpha=0.4, **SGD))
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


# ---- low precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_too", [False, True])
def test_bfloat16(weights_too):
    """Autocast: gradients and steps are float32. All of it in bfloat16: one step as arithmetic in float32, rounded."""
    dtype = torch.bfloat16 if weights_too else torch.float32
    ours, plain = network(dtype), network(dtype)
    optimizer = SAM(ours.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    x, y = batch(0, dtype)

    def gradients(model):
        with contextlib.nullcontext() if weights_too else torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - y).float().square().mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    def give(model):
        for p, g in zip(model.parameters(), gradients(model), strict=True):
            p.grad = g

    give(ours)
    optimizer.step(lambda: give(ours))
    ys = gradients(plain)
    norm = sum(g.double().square().sum() for g in ys).sqrt()
    old = weights(plain)
    with torch.no_grad():
        for p, g in zip(plain.parameters(), ys, strict=True):
            p.copy_(p.float() + g.float() * (0.3 / norm).float())
    for p, w, x_ in zip(plain.parameters(), old, gradients(plain), strict=True):
        p.data = (w.float() - 0.1 * x_.float()).to(dtype)
    for a, b in zip(weights(ours), weights(plain), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=8e-3 if weights_too else 1e-6, atol=1e-3 if weights_too else 1e-6)


# ---- accelerate, and our engine -----------------------------------------------------------------------------------


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    state = pytest.importorskip("accelerate.state")
    plain = network()
    fit(plain, GSAM(plain.parameters(), torch.optim.SGD, rho=0.3, **SGD))
    state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        optimizer = GSAM(model.parameters(), torch.optim.SGD, rho=0.3, **SGD)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        for i in range(STEPS):
            x, y = batch(i)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                accelerator.backward((model(x) - y).square().mean())

            closure()
            optimizer.step(closure)
            schedule.step()
        close(weights(model), weights(plain))
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)


def test_our_engine(tmp_path):
    """A recipe gives `run.update` the loss as a closure: as a loop by hand, also if it stops and resumes in between."""
    pytest.importorskip("accelerate")  # the engine's
    from toy_method.recipe import Numbers, Regression

    from pyface.engine import Trainer
    from pyface.engine.sampling import seed_everything

    class Sharp(Regression):
        manual = True
        best = {}
        stops = False

        def optimizers(self, model):
            return GSAM(model.parameters(), torch.optim.SGD, rho=0.05, **SGD | {"lr": 0.01})

        def order(self, epoch, length, rng):
            return range(length)

        def schedulers(self, run):
            return []

        def step(self, run, batch):
            if self.stops and run.step == 7:
                raise KeyboardInterrupt
            loss = self.loss(run.model, batch)
            run.backward(loss)
            run.update(run.optimizers["main"], lambda: self.loss(run.model, batch))
            return {"loss": loss}

    class Stops(Sharp):
        stops = True

    def train(folder, recipe=Sharp):
        config = recipe.Config.preset(noise=0.0, epochs=1, checkpoint_every=5)
        return Trainer(recipe(config), tmp_path / folder, resume=True).fit()

    whole = train("whole")
    with contextlib.suppress(KeyboardInterrupt):
        train("parts", Stops)
    resumed = train("parts")
    seed_everything(0, 0, 0)
    recipe = Sharp(Sharp.Config.preset())
    by_hand, numbers = recipe.model(), Numbers()
    optimizer = recipe.optimizers(by_hand)
    for i in range(len(numbers) // 8):
        x = numbers.x[8 * i : 8 * i + 8]

        def closure(x=x):
            optimizer.zero_grad()
            (by_hand(x)[:, 0] - x.sum(1)).square().mean().backward()

        closure()
        optimizer.step(closure)
    for other in (resumed, by_hand):
        for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)


if __name__ == "__main__":
    torch.save(in_process(1, sys.argv[1]), Path(sys.argv[1]) / "results.pt")
