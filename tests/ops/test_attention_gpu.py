"""The CUDA and the Triton path of core `attention` on a GPU: numbers, order of sums, streams, graphs, memory."""

import pytest
import torch
from attention_gpu_expected import (
    BF16,
    CASES,
    F16,
    F32,
    SMOOTH,
    TYPE_IDS,
    TYPES,
    Case,
    check,
    check_backward,
    check_forward,
    exact,
    forward,
    frozen_model,
    model,
    not_a_number,
    switched_off,
    tensors,
    views,
)

import pyface
from pyface.ops import concat_kv_attention, spatial_prior_attention
from pyface.ops.attention import CORE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
LARGER = {
    "text encoder": Case(77, 77, 1, depth=64, batch=8, heads=12, causal=True),
    "many rows": Case(77, 77, 64, depth=64, batch=3, heads=12, causal=True, shared=False),
    "long": Case(1030, 1040, 16, depth=64, heads=2, causal=True),
    "vision": Case(197, 197, 4, depth=80, width=128, batch=2, heads=3, by_rows=True),
    "decoder": Case(6, 256, 0, depth=64, batch=4, heads=4, grid=16, biased=False),
}


@pytest.fixture(params=["cuda", "triton"])
def path(request):
    with pyface.paths(request.param):
        yield request.param


@pytest.fixture
def core(path):
    """The path's implementation behind the op."""
    return CORE.pick(DEVICE, (F32, F32), path)


def leaves(t):
    return {name: None if v is None else v.detach().requires_grad_() for name, v in t.items()}


def call(case, t):
    """Through the public functions: (out, lse)."""
    if case.grid and not case.extras:
        centre, sharpness = t["prior"].split(2, -1)
        heads = t["query"], t["key"], t["value"]
        return spatial_prior_attention(*heads, centre, sharpness, case.grid, smooth=SMOOTH, return_lse=True)
    rows = (t[n] if case.batch > 1 and not case.shared else t[n][0] for n in ("extra_key", "extra_value"))
    bias = 0.0 if t["extra_bias"] is None else t["extra_bias"]
    return concat_kv_attention(
        t["query"], t["key"], t["value"], *rows, is_causal=case.causal, extra_bias=bias, return_lse=True
    )


def gradients(t, out, lse, grad, grad_lse):
    names = [n for n, v in t.items() if v is not None]
    found = torch.autograd.grad((out, lse), [t[n] for n in names], (grad, grad_lse), allow_unused=True)
    by_name = dict(zip(names, found, strict=True))
    return tuple(torch.zeros_like(v) if v is not None and by_name[n] is None else by_name.get(n) for n, v in t.items())


def step(case, t, grad, grad_lse):
    out, lse = call(case, t)
    return [out.detach(), lse.detach(), *(g for g in gradients(t, out, lse, grad, grad_lse) if g is not None)]


def with_grads(case, types=(F32, F32)):
    t = leaves(tensors(case, types, DEVICE))
    out, lse = call(case, t)
    torch.manual_seed(1)
    return t, torch.randn_like(out), torch.randn_like(lse)


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# A prior beside extra rows is for the kernels' own tests: no public function asks for both.
PUBLIC = [n for n, c in CASES.items() if not (c.grid and c.extras)]


@pytest.mark.parametrize("name", [*PUBLIC, *(f"larger {n}" for n in LARGER)])
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_values_and_gradients(path, types, name):
    case = LARGER[name.removeprefix("larger ")] if name.startswith("larger ") else CASES[name]
    t, grad, grad_lse = with_grads(case, types)
    out, lse = call(case, t)
    loose = 4.0 if name.startswith("larger ") else 1.0
    check_forward(case, t, out, lse, loose)
    check_backward(case, t, grad, grad_lse, gradients(t, out, lse, grad, grad_lse), loose=loose)


@pytest.mark.parametrize("name", LARGER)
def test_twenty_runs_have_the_same_bits(path, name):
    for types in (TYPES[0], TYPES[4]):
        t, grad, grad_lse = with_grads(LARGER[name], types)
        first = step(LARGER[name], t, grad, grad_lse)
        for _ in range(20):
            assert equal(step(LARGER[name], t, grad, grad_lse), first)


def test_frozen_model_reads_no_key(core):
    frozen_model(core, DEVICE)


@pytest.mark.parametrize("types", [TYPES[0], TYPES[2], TYPES[3]], ids=["float32", "bfloat16", "float16"])
def test_what_is_not_a_number_reaches_only_rows_that_see_it(core, types):
    not_a_number(core, types, DEVICE)


def test_rows_switched_off_and_huge_scores(core):
    switched_off(core, DEVICE)


@pytest.mark.parametrize("types", [TYPES[0], TYPES[4]], ids=["float32", "bfloat16 with float32"])
def test_views_and_odd_addresses_are_taken(core, types):
    views(core, types, DEVICE)


def test_tf32_is_used_only_where_torch_allows_it(core):
    case = Case(128, 128, 2, depth=64)
    t = tensors(case, device=DEVICE)
    plain, _ = forward(core, case, t)
    expected, _ = model(case, exact(t))
    check("out", plain, expected, F32, 2.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rounded, _ = forward(core, case, t)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(rounded, plain)
    check("out", rounded, expected, F16, 2.0)


def test_autocast_keeps_trained_rows_in_float32(path):
    case = LARGER["text encoder"]
    t, grad, grad_lse = with_grads(case)
    with torch.autocast(DEVICE, BF16):
        out, lse = call(case, t)
    assert out.dtype == BF16
    grads = gradients(t, out, lse, grad.to(BF16), grad_lse)
    assert all(g.dtype == F32 for g in grads if g is not None)
    low = {n: v if v is None or n.startswith("extra") else v.detach().to(BF16) for n, v in t.items()}
    assert torch.equal(call(case, low)[0], out)


def test_side_stream_with_a_slow_producer(path):
    """A kernel on any other stream than the current one would read its arguments before they are there."""
    case = LARGER["text encoder"]
    final, grad, grad_lse = with_grads(case)
    expected = step(case, final, grad, grad_lse)
    inputs = leaves({n: None if v is None else torch.zeros_like(v) for n, v in final.items()})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for name, v in inputs.items():
                if v is not None:
                    v.copy_(final[name])
        found = step(case, inputs, grad, grad_lse)
    stream.synchronize()
    assert equal(found, expected)


def test_graph_capture_and_replay_with_changed_inputs(path):
    case = LARGER["text encoder"]
    t, grad, grad_lse = with_grads(case, TYPES[4])
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step(case, t, grad, grad_lse)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, t, grad, grad_lse)
    for _ in range(2):
        with torch.no_grad():
            for v in t.values():
                if v is not None:
                    v.copy_(torch.randn_like(v))
        graph.replay()
        torch.cuda.synchronize()
        assert equal(captured, step(case, t, grad, grad_lse))


def test_no_key_is_copied(path):
    case = Case(2048, 2048, 16, depth=64, batch=2, heads=8, causal=True)
    t = tensors(case, TYPES[2], DEVICE)
    call(case, t)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = call(case, t)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes - lse.nbytes < t["key"].nbytes / 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one(path):
    case = CASES["two samples"]
    t = tensors(case, device="cuda:1")
    out, lse = call(case, t)
    assert torch.cuda.current_device() == 0
    check_forward(case, t, out, lse)


def test_heads_beyond_32_bit_offsets(path):
    """The last head's keys lie past 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    key = torch.zeros(1, 3, 2**24, 64, dtype=BF16, device=DEVICE)
    key[0, 2, -8:] = torch.randn(8, 64, device=DEVICE).to(BF16)
    query = torch.randn(1, 3, 4, 64, device=DEVICE).to(BF16)
    rows = key[0, :, :0]
    # The last 8 keys of the last head: the same through a view that begins 2^31 elements later.
    far = concat_kv_attention(query, key[:, :, -8:], key[:, :, -8:], rows, rows, is_causal=True)
    near = key[:, :, -8:].clone()
    assert torch.equal(far, concat_kv_attention(query, near, near, rows, rows, is_causal=True))
