"""The CUDA and the Triton path of core `coupling` on a GPU: numbers, streams, graph capture, devices."""

import pytest
import torch
from coupling_expected import (
    ACTIVATIONS,
    PAIR_IDS,
    TYPE_PAIRS,
    check_backward,
    check_forward,
    check_haar,
    check_inverse_haar,
)

import pyface
from pyface.ops import affine_coupling, haar_dwt2d, haar_idwt2d

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [(3, 1), (2, 17), (3, 2049), (2, 12, 32, 32), (5, 3, 31, 29)]
LAYOUTS = ["contiguous", "channels_last", "halves"]
SLACK = 2  # the device's own exp and, in Triton, division are good to two units in the last place, not one


@pytest.fixture(params=["cuda", "triton"])
def path(request):
    with pyface.paths(request.param):
        yield request.param


def samples(shape, dtype, layout="contiguous", scale=1.5):
    v = (torch.randn(shape[0], 2, *shape[1:], device="cuda") * scale).to(dtype)
    if layout == "halves":
        return v[:, 1]
    v = v[:, 0].clone(memory_format=torch.contiguous_format)
    return v.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and v.dim() == 4 else v


def three(shape, types, layout="contiguous", **kwargs):
    return [samples(shape, dtype, layout, **kwargs) for dtype in (types[0], types[1], types[1])]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
def test_coupling_and_its_gradients(path, types, activation, inverse):
    for shape in SHAPES:
        for layout in LAYOUTS:
            x, s, t = (v.requires_grad_() for v in three(shape, types, layout))
            y, log_det = affine_coupling(
                x, s, t, clamp=1.7, clamp_activation=activation, inverse=inverse, return_log_det=True
            )
            g, lam = torch.randn_like(y), torch.randn_like(log_det)
            grad_x, grad_s, grad_t = torch.autograd.grad([y, log_det], [x, s, t], [g, lam])
            options = dict(clamp=1.7, activation=activation, inverse=inverse, slack=SLACK)
            x, s, t, y, log_det, g, lam = (v.detach().cpu() for v in (x, s, t, y, log_det, g, lam))
            check_forward(x, s, t, y, log_det, **options)
            value = y if inverse else x
            check_backward(g, lam, value, s, None, grad_x.cpu(), grad_s.cpu(), from_output=False, **options)
            assert torch.equal(grad_t.cpu(), (-grad_x.cpu() if inverse else g).to(t.dtype))


@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
def test_haar(path, types):
    for shape in [(1, 1, 2, 2), (2, 3, 64, 96), (3, 2, 10, 14), (1, 3, 256, 258)]:
        image = samples(shape, types[0])
        bands = haar_dwt2d(image)
        check_haar(image.cpu(), bands.cpu())
        check_inverse_haar(bands.cpu(), haar_idwt2d(bands).cpu())


def test_log_det_bits(path):
    x, s, t = three((6, 12, 64, 64), TYPE_PAIRS[0])
    y, log_det = affine_coupling(x, s, t, return_log_det=True)
    for _ in range(20):
        again, repeated = affine_coupling(x, s, t, return_log_det=True)
        assert torch.equal(repeated, log_det)
        assert torch.equal(again, y)
    _, alone = affine_coupling(x[2:3], s[2:3], t[2:3], return_log_det=True)
    _, undone = affine_coupling(y, s, t, inverse=True, return_log_det=True)
    odd = [torch.empty(v.numel() + 1, dtype=v.dtype, device="cuda")[1:].view(v.shape).copy_(v) for v in (x, s, t)]
    _, across = affine_coupling(*odd, return_log_det=True)
    assert torch.equal(across, log_det)
    assert torch.equal(alone, log_det[2:3])
    assert torch.equal(undone, -log_det)


def test_side_stream_with_a_slow_producer(path):
    """A kernel on any other stream than the current one would read x, s and t before they are there."""
    final = three((4, 12, 64, 64), TYPE_PAIRS[0])
    expected = affine_coupling(*final, return_log_det=True)
    bands = haar_dwt2d(final[0])
    inputs = [torch.zeros_like(v) for v in final]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for v, f in zip(inputs, final, strict=True):
            v.copy_(f)
        got = affine_coupling(*inputs, return_log_det=True)
        got_bands = haar_dwt2d(inputs[0])
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(got_bands, bands)


def test_graph_capture_and_replay_with_changed_inputs(path):
    x, s, t = (v.requires_grad_() for v in three((2, 12, 32, 32), TYPE_PAIRS[0]))
    g = torch.randn_like(x)

    def step():
        y, log_det = affine_coupling(x, s, t, return_log_det=True)
        gradients = torch.autograd.grad([y, log_det], [x, s, t], [g, torch.ones_like(log_det)])
        return [y.detach(), log_det.detach(), *gradients, haar_dwt2d(y.detach())]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for v in (x, s, t):
                v.copy_(torch.randn_like(v))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensor_on_another_device_than_the_current_one(path):
    x, s, t = (v.to("cuda:1") for v in three((2, 300), TYPE_PAIRS[0]))
    y, log_det = affine_coupling(x, s, t, return_log_det=True)
    assert torch.cuda.current_device() == 0
    check_forward(
        x.cpu(), s.cpu(), t.cpu(), y.cpu(), log_det.cpu(), clamp=2.0, activation="sigmoid", inverse=False, slack=SLACK
    )


def test_sample_beyond_32_bit_offsets(path):
    """The last sample starts past 2^31 elements."""
    inner = 2**30 + 16
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * 3 * inner:
        pytest.skip(f"needs {30 * inner / 2**30:.0f} GiB of free GPU memory")
    x = torch.zeros(3, inner, dtype=torch.bfloat16, device="cuda")
    s, t = torch.zeros_like(x), torch.zeros_like(x)
    x[2, -7:], s[2, -7:], t[2, -7:] = 1.5, 0.25, -2.0
    y, log_det = affine_coupling(x, s, t, clamp_activation="none", return_log_det=True)
    assert log_det.tolist() == [0.0, 0.0, 7 * 0.25]
    expected = torch.full((7,), 1.5 * 2.718281828459045**0.25 - 2.0).bfloat16()
    assert torch.equal(y[2, -7:].cpu(), expected)
    assert not y[:2].any()
    assert not y[2, :-7].any()
