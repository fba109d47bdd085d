"""Core `spectral` on a GPU: both paths against float64, streams, graphs, and devices that are chosen by the tensor."""

from __future__ import annotations

import pytest
import torch
from spectral_expected import CASES, DTYPES, F32, check_core

import pyface
from pyface.ops import high_pass, mask_high_frequencies, spectral_filter
from pyface.ops.reference import spectral as reference
from pyface.ops.spectral import CORE

pytestmark = pytest.mark.gpu
PATHS = ["cuda", "triton"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, ((4, 3, 224, 224), (5, 5), False), ((2, 299, 299), (16, 16), True)], ids=str)
def test_values_signs_and_gradients(path, case, dtype):
    check_core(CORE.pick("cuda", (dtype,), path), case, dtype, device="cuda")


@pytest.mark.parametrize("path", PATHS)
def test_channels_last(path):
    check_core(CORE.pick("cuda", (F32,), path), ((2, 3, 33, 20), (3, 3), False), F32, "cuda", torch.channels_last)


@pytest.mark.parametrize("path", PATHS)
def test_side_stream_and_graph_replay(path):
    x = torch.randn(4, 3, 64, 64, device="cuda")
    keep = torch.rand(64, 64, device="cuda") > 0.3
    out = torch.empty_like(x)
    with pyface.paths(path):
        mask_high_frequencies(x, keep, out=out)  # tables and kernels are made before anything is captured
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            source = x * 2
            late = mask_high_frequencies(source, keep)
        stream.synchronize()
        torch.testing.assert_close(late, mask_high_frequencies(x * 2, keep))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mask_high_frequencies(x, keep, out=out)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(out, mask_high_frequencies(x, keep))


@pytest.mark.parametrize("path", PATHS)
def test_tf32_does_not_leak_in_and_bits_are_the_same(path):
    x = torch.randn(8, 112, 112, device="cuda")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with pyface.paths(path):
            found = high_pass(x, 16)
            assert torch.equal(high_pass(x[3:4], 16)[0], found[3])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    exact = reference.high_pass(x.cpu().double(), (16, 16), False)
    assert (found.cpu().double() - exact).abs().max() <= 1e-5


def test_gains_that_no_real_image_can_follow_mean_the_same_as_on_the_cpu():
    x, gain = torch.randn(2, 64, 48), torch.randn(64, 25)
    torch.testing.assert_close(
        spectral_filter(x.cuda(), gain.cuda()).cpu(), spectral_filter(x, gain), rtol=0, atol=1e-4
    )
