"""Every metric's result is that of all samples, however they are spread over batches, copies and processes."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st

from pyface import metrics

COUNT = 12
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


def _cases():
    """name -> (function that makes the metric, the samples by argument, whether the result is exact)."""
    draw = torch.Generator().manual_seed(0)

    def pictures(*more, size=16):
        return torch.rand(COUNT, *more, 3, size, size, generator=draw)

    def ids():
        return torch.randint(0, 3, (COUNT, 5), generator=draw)

    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    scores = torch.rand(COUNT, generator=draw)
    logits = torch.randn(COUNT, 2, generator=draw) * 5
    videos = [f"{'real' if number < 6 else 'fake'}/{'ä' * (number % 3)}" for number in range(COUNT)]
    coarse = (torch.rand(COUNT, generator=draw) * 8).round() / 8
    sequences = {"predicted": ids(), "target": ids()}
    pair = {"drawn": pictures(), "reference": pictures()}
    clip = metrics.ClipEncoders(3, _colour, _letters)
    concept = {
        "references": pictures(),
        "generations": pictures(),
        "prompts": [*"rgbrgbrgbrgb"],
        "reference_masks": torch.rand(COUNT, 1, 16, 16, generator=draw),
        "generation_masks": torch.rand(COUNT, 1, 16, 16, generator=draw),
    }
    return {
        "fixed": (metrics.FixedAccuracy, sequences, True),
        "adaptive": (metrics.AdaptiveAccuracy, sequences, True),
        "csm": (metrics.CompleteSequenceMatch, sequences, True),
        "eer": (metrics.EqualErrorRate, {"scores": coarse, "labels": labels}, True),
        "clip accuracy": (metrics.ClipAccuracy, {"scores": scores, "labels": labels}, True),
        "video auroc": (metrics.VideoAUROC, {"scores": scores, "labels": labels, "videos": videos}, True),
        "video auroc of logits": (
            _ratio_auroc,
            {"scores": logits, "labels": labels, "videos": [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]},
            True,
        ),
        "video eer": (metrics.VideoEqualErrorRate, {"scores": scores, "labels": labels, "videos": videos}, True),
        "video accuracy": (metrics.VideoAccuracy, {"scores": scores, "labels": labels, "videos": videos}, True),
        "identity": (_identity, {"first": pictures(), "second": pictures()}, False),
        "verification": (_verification, {"similarities": coarse, "same": labels}, True),
        "gaze": (
            metrics.AngularError,
            {"predicted": torch.randn(COUNT, 2, generator=draw), "target": torch.randn(COUNT, 2, generator=draw)},
            False,
        ),
        "scoot": (metrics.Scoot, pair, False),
        "fsim": (metrics.Fsim, pair, False),
        "keys": (metrics.KeyRecovery, {"original": pictures(), "right": pictures(), "wrong": pictures(2)}, False),
        "clip": (lambda: metrics.ClipAlignment(clip, masked=True), concept, False),
    }  # fmt: skip


def _colour(images):
    return images.mean((2, 3))


def _letters(prompts):
    return torch.tensor([[float(letter in prompt) for letter in "rgb"] for prompt in prompts])


def _ratio_auroc():
    return metrics.VideoAUROC(rule="sigmoid_ratio")


def _identity():
    return metrics.IdentitySimilarity(_colour, threshold=0.99)


def _verification():
    return metrics.VerificationRate(far=0.2)


CASES = _cases()


def _feed(metric, samples, which):
    metric.update(
        **{
            name: values[which] if isinstance(values, torch.Tensor) else [values[i] for i in which]
            for name, values in samples.items()
        }
    )


def _plain(result):
    result = result if isinstance(result, dict) else {"value": result}
    assert all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in result.values())
    return torch.stack([value.double() for value in result.values()])


def _whole(name):
    make, samples, _ = CASES[name]
    metric = make()
    _feed(metric, samples, range(COUNT))
    result = _plain(metric.compute())
    assert result.isfinite().all()
    return result


def _same(name, result, expected):
    exact = CASES[name][2]
    torch.testing.assert_close(result, expected, rtol=0 if exact else 1e-6, atol=0)


def test_importing_the_packages_is_light(tmp_path):
    code = "import sys, pyface.metrics, pyface.backbones; print({'torch', 'numpy', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "set()"


def test_every_metric_is_here():
    public = {getattr(metrics, name) for name in metrics.__all__}
    classes = {one for one in public if isinstance(one, type) and issubclass(one, torchmetrics.Metric)}
    assert classes == {type(make()) for make, _, _ in CASES.values()}
    for one in classes:
        assert one.is_differentiable is False
        assert one.full_state_update is False


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("eer", False), ("video eer", False), ("gaze", False), ("identity", None), ("keys", None)]
    + [(name, True) for name in ("fixed", "adaptive", "csm", "clip accuracy", "video auroc", "video accuracy")]
    + [(name, True) for name in ("verification", "scoot", "fsim", "clip")],
)
def test_which_way_is_better(name, wanted):
    assert CASES[name][0]().higher_is_better is wanted


@pytest.mark.parametrize("name", CASES)
def test_any_split_into_batches_and_any_order_gives_the_same(name):
    make, samples, _ = CASES[name]
    expected = _whole(name)

    @settings(max_examples=6, deadline=None)
    @given(st.permutations(range(COUNT)), st.sets(st.integers(0, COUNT)))
    def check(order, cuts):
        bounds = [0, *sorted(cuts), COUNT]
        metric = make()
        for start, stop in zip(bounds, bounds[1:]):
            _feed(metric, samples, order[start:stop])  # may be empty
        _same(name, _plain(metric.compute()), expected)

    check()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [0, 5])
def test_merged_states_are_those_of_all_samples(name, cut):
    make, samples, _ = CASES[name]
    first, second = make(), make()
    if cut:
        _feed(first, samples, range(cut))
    _feed(second, samples, range(cut, COUNT))
    first.merge_state(second)
    _same(name, _plain(first.compute()), _whole(name))


def test_a_collection_does_not_take_two_metrics_for_one():
    """torchmetrics merges metrics whose states are equal after the first batch; here all are, by chance."""
    collection = torchmetrics.MetricCollection([metrics.FixedAccuracy(), metrics.AdaptiveAccuracy()])
    full = torch.tensor([[1, 2, 3, 4, 5]])
    collection.update(full, full)
    collection.update(torch.tensor([[1, 3, 0, 0, 0]]), torch.tensor([[1, 2, 0, 0, 0]]))
    assert collection.compute() == {"FixedAccuracy": torch.tensor(9 / 10), "AdaptiveAccuracy": torch.tensor(6 / 7)}
    drawing = torchmetrics.MetricCollection([metrics.Scoot(), metrics.Fsim()])
    sketch, other = torch.rand(2, 1, 1, 16, 16)
    for drawn in (sketch, other):
        drawing.update(drawn, sketch)
    for name, measure in (("Scoot", metrics.scoot), ("Fsim", metrics.fsim)):
        assert drawing.compute()[name].item() == pytest.approx((1 + measure(other, sketch).item()) / 2)


def test_a_collection_keeps_the_frames_of_the_video_metrics_once():
    collection = torchmetrics.MetricCollection([metrics.VideoAUROC(), metrics.VideoAccuracy()])
    for score, label in ((0.2, 0), (0.4, 1), (0.6, 1)):
        collection.update(torch.tensor([score]), torch.tensor([label]), [str(score)])
    assert collection.compute() == {"VideoAUROC": torch.tensor(1.0), "VideoAccuracy": torch.tensor(2 / 3)}
    assert len(collection.compute_groups) == 1


@pytest.mark.parametrize("name", CASES)
def test_state_survives_a_checkpoint(name):
    make, samples, _ = CASES[name]
    first, second = make(), make()
    for metric in (first, second):
        metric.persistent(True)
    _feed(first, samples, range(COUNT))
    second.load_state_dict(first.state_dict())
    second._update_count = 1  # or torchmetrics warns that compute came first
    _same(name, _plain(second.compute()), _whole(name))


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    """Samples dealt alternately to two processes; and all to the first, so that the second has seen none."""
    child = subprocess.Popen([sys.executable, __file__, str(tmp_path)], cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        results = _results(tmp_path, rank=0)
        errors = child.communicate(timeout=120)[1].decode()
    finally:
        child.kill()
    assert child.returncode == 0, errors
    for rank in (results, torch.load(tmp_path / "results.pt")):
        assert len(rank) == 2 * len(CASES)
        for (name, _), result in rank.items():
            _same(name, result, _whole(name))


def _results(folder, rank):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    try:
        results = {}
        for name, (make, samples, _) in CASES.items():
            for shared in (True, False):
                metric = make()
                mine = list(range(rank, COUNT, 2)) if shared else list(range(COUNT)) if rank == 0 else []
                for start in range(0, len(mine), 4):
                    _feed(metric, samples, mine[start : start + 4])
                results[name, shared] = _plain(metric.compute())
                assert not metric._is_synced  # the local state is back, and can be added to
        return results
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(_results(sys.argv[1], rank=1), f"{sys.argv[1]}/results.pt")
