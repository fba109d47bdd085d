"""The CUDA and the Triton path of core `deform_conv` on a GPU: numbers, order of sums, streams, graphs, autocast."""

import contextlib

import pytest
import torch
from deform_conv_expected import (
    BF16,
    CASES,
    F32,
    TYPE_IDS,
    TYPES,
    Case,
    border,
    check,
    check_backward,
    check_forward,
    tensors,
    wide,
)

import pyface
from pyface.ops import deform_conv2d
from pyface.ops.reference import deform_conv as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
NAMES = ("input", "offset", "weight", "mask")
LARGER = {
    "tiles": Case(2, 96, 160, (20, 23), groups=2, offset_groups=3, layout=torch.channels_last),
    "strided": Case(3, 64, 256, (33, 31), (3, 3), stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
    "few pixels": Case(1, 512, 512, (2, 2), offset_groups=2),
}


@pytest.fixture(params=["cuda", "triton"])
def path(request):
    with pyface.paths(request.param):
        yield request.param


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def call(case, t):
    return deform_conv2d(t["input"], t["offset"], t["weight"], t["bias"], *case.geometry, t["mask"])


def leaves(t):
    return {name: v if v is None else v.requires_grad_() for name, v in t.items()}


def gradients(out, t, grad):
    """Of input, offset, weight and mask."""
    given = [t[name] for name in NAMES if t[name] is not None]
    found = dict(zip([n for n in NAMES if t[n] is not None], torch.autograd.grad(out, given, grad), strict=True))
    return [found.get(name) for name in NAMES]


@pytest.mark.parametrize("name", [*CASES, *(f"larger {n}" for n in LARGER)])
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_values_and_gradients(path, types, name):
    case = LARGER[name.removeprefix("larger ")] if name.startswith("larger ") else CASES[name]
    t = leaves(tensors(case, types, DEVICE))
    out = call(case, t)
    check_forward(case, t, out)
    grad = torch.randn_like(out)
    check_backward(case, t, grad, gradients(out, t, grad))
    with deterministic():
        check_backward(case, t, grad, gradients(call(case, t), t, grad))


@pytest.mark.parametrize("name", LARGER)
def test_twenty_runs_have_the_same_bits_where_torch_asks_for_it(path, name):
    case = LARGER[name]
    t = leaves(tensors(case, device=DEVICE))
    grad = torch.randn_like(call(case, t))
    with deterministic():
        first = [call(case, t), *gradients(call(case, t), t, grad)]
        for _ in range(20):
            again = [call(case, t), *gradients(call(case, t), t, grad)]
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_all_but_the_gradient_of_the_input_has_the_same_bits_always(path):
    case = LARGER["tiles"]
    t = leaves(tensors(case, device=DEVICE))
    out = call(case, t)
    grad = torch.randn_like(out)
    first = gradients(out, t, grad)
    for _ in range(5):
        assert torch.equal(call(case, t), out)
        again = gradients(call(case, t), t, grad)
        assert all(torch.equal(a, b) for a, b in zip(again[1:], first[1:], strict=True))
        assert torch.allclose(again[0], first[0], rtol=1e-4, atol=1e-4)


def test_borders_whole_positions_and_no_numbers(path):
    case, t = border()
    t = leaves({name: v if v is None else v.to(DEVICE) for name, v in t.items()})
    out = call(case, t)
    check_forward(case, t, out)
    grad = torch.randn_like(out)
    check_backward(case, t, grad, gradients(out, t, grad))


def test_tf32_is_used_only_where_torch_allows_it(path):
    case = Case(1, 256, 64, (16, 16))
    t = tensors(case, device=DEVICE)
    exact = reference.deform_conv2d(
        *(wide(t[n]) for n in ("input", "offset", "weight", "bias")), *case.geometry, wide(t["mask"])
    )
    plain = call(case, t)
    check("out", plain, exact, F32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rounded = call(case, t)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(rounded, plain)
    assert (wide(rounded) - exact).abs().amax() < 2e-3 * exact.abs().amax()


def test_autocast_keeps_low_precision_and_offsets_as_they_are(path):
    case = LARGER["tiles"]
    t = leaves(tensors(case, device=DEVICE))
    with torch.autocast("cuda", BF16):
        out = call(case, t)
    low = {name: v.detach().to(BF16) if name in ("input", "weight", "bias") else v for name, v in t.items()}
    assert out.dtype == BF16
    assert torch.equal(out, call(case, low))
    found = gradients(out, t, torch.randn_like(out))
    assert [g.dtype for g in found] == [F32] * 4


def test_side_stream_with_a_slow_producer(path):
    """A kernel on any other stream than the current one would read its arguments before they are there."""
    case = LARGER["tiles"]
    final = tensors(case, device=DEVICE)
    grad = torch.randn_like(call(case, final))
    expected_t = leaves({name: v.clone() for name, v in final.items()})
    expected = call(case, expected_t)
    expected_grads = gradients(expected, expected_t, grad)
    inputs = leaves({name: torch.zeros_like(v) for name, v in final.items()})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for name, v in inputs.items():
                v.copy_(final[name])
        got = call(case, inputs)
        got_grads = gradients(got, inputs, grad)
    stream.synchronize()
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(got_grads[1:], expected_grads[1:], strict=True))
    assert torch.allclose(got_grads[0], expected_grads[0], rtol=1e-4, atol=1e-4)


def test_graph_capture_and_replay_with_changed_inputs(path):
    case = LARGER["strided"]
    t = leaves(tensors(case, device=DEVICE))
    grad = torch.randn_like(call(case, t))

    def step():
        out = call(case, t)
        return [out.detach(), *gradients(out, t, grad)]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        fresh = tensors(case, device=DEVICE)
        with torch.no_grad():
            for name, v in t.items():
                v.copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
        out, grad_input, *others = step()
        assert torch.equal(captured[0], out)
        assert torch.allclose(captured[1], grad_input, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(captured[2:], others, strict=True))


def test_columns_never_reach_memory(path):
    case = Case(4, 256, 256, (64, 64), layout=torch.channels_last)
    t = tensors(case, (BF16, BF16), DEVICE)
    call(case, t)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call(case, t)
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    columns = 9 * t["input"].nbytes
    assert extra < 2 * t["weight"].nbytes < columns / 10


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one(path):
    case = CASES["uneven"]
    t = tensors(case, device="cuda:1")
    out = call(case, t)
    assert torch.cuda.current_device() == 0
    check_forward(case, t, out)


def test_pixel_beyond_32_bit_offsets(path):
    """The last image lies past 2^31 elements."""
    size = 8300
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    x = torch.zeros(2, 32, size, size, dtype=BF16, device="cuda").to(memory_format=torch.channels_last)
    x[1, :, -5:, -5:] = torch.randn(32, 5, 5, device="cuda").to(BF16)
    offset = torch.full((2, 2, size, size), 0.25, dtype=BF16, device="cuda")
    weight = torch.randn(1, 32, 1, 1, device="cuda").to(BF16)
    out = deform_conv2d(x, offset, weight)
    assert not out[0].any()
    corner = x[1:, :, -5:, -5:].contiguous()
    expected = reference.deform_conv2d(wide(corner), wide(offset[1:, :, -5:, -5:]), wide(weight))
    check("the last corner", out[1:, :, -5:, -5:], expected, BF16)
