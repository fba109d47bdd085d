"""Core `sharpness` on a GPU: both paths against float64, order of sums, streams, graphs, no waiting for the device."""

from __future__ import annotations

import pytest
import torch
from sharpness_expected import BF16, F32, SIZES, Passes, check_rule, check_sums, make, to

import pyface
from pyface.ops import multi_combine_, multi_dots, multi_norm, multi_step_, perturb_, restore_
from pyface.ops.sharpness import CORE

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def path(request):
    with pyface.paths(request.param):
        yield request.param


@pytest.fixture
def core(path):
    return CORE.pick("cuda", (F32, F32), path)


class TestPasses(Passes):
    device = "cuda"
    few = long = [*SIZES, 1_000_003, 5_000_000]

    def positions(self, dtype):
        return [0, 33000, 40002]


def test_two_thousand_small_tensors(core):
    check_sums(core, (F32, F32), [64] * 2000, "cuda")
    check_rule(core, (F32, F32), "constrained", {"lower": 0.3, "upper": 0.6}, True, [64] * 2000, "cuda")


@pytest.mark.slow
def test_more_elements_than_32_bits_count(path):
    size = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip("needs 16 GiB of free GPU memory")
    y = [torch.ones(size, dtype=BF16, device="cuda")]
    y[0][-1] = 3
    sums = multi_norm(y)
    assert sums.values[:, 1].tolist() == [size + 8] * 2
    w = [torch.zeros_like(y[0])]
    w[0][-1] = 5
    saved = [torch.empty_like(w[0])]
    perturb_(w, y, saved, sums, 100.0 * (size + 8) ** 0.5)
    assert (w[0][0].item(), w[0][-1].item(), saved[0][-1].item()) == (100, 304, 5)
    assert w[0].min().item() == 100
    restore_(w, saved)
    assert (w[0][0].item(), w[0][-1].item()) == (0, 5)
    y[0][-1] = float("nan")
    assert multi_norm(y).nonfinite.tolist() == [0, 1]


def test_twenty_runs_and_two_streams_give_the_same_bits(path):
    _, x, y = to("cuda", *make([3_000_001, 5, 70000]))
    expected = multi_dots(x, y).values
    stream = torch.cuda.Stream()
    for run in range(20):
        with torch.cuda.stream(stream if run % 2 else torch.cuda.current_stream()):
            stream.wait_stream(torch.cuda.default_stream())
            found = multi_dots(x, y).values
        torch.cuda.synchronize()
        assert torch.equal(found, expected)


def whole_step(w, saved, x, y, m, rho=0.1):
    perturb_(w, y, saved, multi_norm(y), rho)
    restore_(w, saved)
    sums = multi_dots(x, y)
    multi_step_(w, saved, x, y, m, sums, "gsam", alpha=0.4, lr=0.1, momentum=0.9, nesterov=True)
    multi_combine_(x, y, sums, "gsam", alpha=0.4)


def operands():
    w, x, y = to("cuda", *make([100_003, 17, 5000]))
    return w, [torch.zeros_like(t) for t in w], x, y, [t.sin() for t in w]


def test_nothing_waits_for_the_device(path):
    lists = operands()
    whole_step(*lists)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole_step(*lists)
        whole_step(*lists, rho=0.2)  # a table that is not there yet
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("known", [True, False], ids=["tables are there", "tables are made under capture"])
def test_side_stream_and_graph_replay(path, known):
    whole_step(*operands())  # kernels are compiled
    lists, same = operands(), operands()
    kept = [[t.clone() for t in tensors] for tensors in lists]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if known:
            whole_step(*lists)
        with torch.cuda.graph(graph, stream=stream):
            whole_step(*lists)
    torch.cuda.synchronize()
    for _ in range(2):
        for tensors, originals in zip(lists, kept, strict=True):
            for t, original in zip(tensors, originals, strict=True):
                t.copy_(original)
        graph.replay()
    whole_step(*same)
    for found, expected in zip(lists, same, strict=True):
        assert all(map(torch.equal, found, expected))


def test_mixtures_of_types_take_the_reference_by_themselves():
    x, y = [torch.randn(100, device="cuda")], [torch.randn(100, device="cuda").half()]
    assert multi_dots(x, y).values.is_cuda


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device(path):
    check_sums(CORE.pick("cuda", (F32, F32), path), (F32, F32), device="cuda:1")
