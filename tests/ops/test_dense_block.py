"""Core `dense_block`: every instruction set against float64, bitwise determinism, layouts, errors, torch integration,
and the C++ core under sanitizers."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyface
from pyface.ops import _paths, dense_block
from pyface.ops.reference import dense_block as reference

CPU = _paths.load_module("_cpu")[0]
CSRC = Path(__file__).resolve().parents[2] / "csrc"
F32, BF16 = torch.float32, torch.bfloat16
SUBNET = (32, 32, 32, 32, 12)  # of PRO-Face S, on 16 channels
NETS = [  # channels of x, outputs of each layer
    (16, SUBNET),
    (3, (5, 7, 1)),  # odd pairs, taps on the lanes
    (1, (1,)),
    (5, (16,)),
    (70, (33, 17, 40)),  # several vectors, the last one short
    (17, (8, 20)),
]
SIZES = [(1, 1), (1, 7), (17, 31), (64, 64), (128, 128)]


def network(channels, outs, dtype=F32):
    weights, biases = [], []
    for out in outs:
        weights.append((torch.randn(out, channels, 3, 3) * (2 / 9 / channels) ** 0.5).to(dtype))
        biases.append((torch.randn(out) * 0.3).to(dtype))
        channels += out
    return weights, biases


def exact(x, weights, biases, slope=0.01):
    return reference.dense_block(
        x.double(), [w.double() for w in weights], [b.double() for b in biases], negative_slope=slope
    )


def rms(v: Tensor) -> float:
    return v.double().square().mean().sqrt().item()


def compiled(*args, **options):
    with pyface.paths("cpu"):
        return dense_block(*args, **options)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [F32, BF16], ids=str)
@pytest.mark.parametrize("net", NETS, ids=lambda net: "-".join(map(str, (net[0], *net[1]))))
def test_every_isa_is_as_close_to_float64_as_torch(isa, net, compute):
    weights, biases = network(*net)
    ours, peer = {}, {}  # errors relative to the values
    for height, width in SIZES if net[1] == SUBNET else SIZES[:3]:
        x = torch.randn(2 if height < 64 else 1, net[0], height, width)
        expected = exact(x, weights, biases)
        plain = reference.dense_block(x, weights, biases, compute_dtype=compute)
        y = compiled(x, weights, biases, compute_dtype=compute)
        assert y.shape == expected.shape
        assert y.dtype == F32
        ours[height, width] = rms(y - expected) / rms(expected)
        peer[height, width] = rms(plain - expected) / rms(expected)
    # the largest, because torch takes another algorithm, with fewer roundings, for images of a few pixels
    assert max(ours.values()) <= 2 * max(peer.values()), (ours, peer)


@pytest.mark.parametrize("compute", [F32, BF16], ids=str)
@pytest.mark.parametrize("weight_type", [F32, BF16], ids=str)
@pytest.mark.parametrize("x_type", [F32, BF16], ids=str)
def test_mixed_types_round_once_and_return_the_type_of_x(isa, x_type, weight_type, compute):
    weights, biases = network(6, (10, 3), weight_type)
    x = torch.randn(2, 6, 9, 21).to(x_type)
    wide = compiled(x.float(), [w.float() for w in weights], [b.float() for b in biases], compute_dtype=compute)
    y = compiled(x, weights, biases, compute_dtype=compute)
    assert torch.equal(y, wide.to(x_type))
    if compute == weight_type:
        assert torch.equal(y, compiled(x, weights, biases))  # the default


def test_bfloat16_means_the_same_on_every_isa():
    weights, biases = network(16, SUBNET)
    x = torch.randn(1, 16, 20, 20)
    before, results = CPU.isa(), []
    for name in CPU.isas():
        CPU.set_isa(name)
        results.append(compiled(x, weights, biases, compute_dtype=BF16))
    CPU.set_isa(before)
    # Features differ where a sum lies half way between two bf16 numbers: far less than bf16 differs from float64.
    error = rms(results[0] - exact(x, weights, biases))
    for name, result in zip(CPU.isas(), results, strict=True):
        assert rms(result - results[0]) <= 0.5 * error, name


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.2, 1.0, -1.5])
def test_slope(isa, slope):
    weights, biases = network(4, (6, 5))
    x = torch.randn(1, 4, 8, 8)
    y = compiled(x, weights, biases, negative_slope=slope)
    torch.testing.assert_close(y.double(), exact(x, weights, biases, slope), rtol=1e-5, atol=1e-5)


def test_a_nan_reaches_the_pixels_that_see_it_and_no_other(isa):
    weights, biases = network(5, (7, 12))  # two layers: two pixels far
    x = torch.randn(2, 5, 12, 30)
    clean = compiled(x, weights, biases)
    x[1, 2, 6, 15] = torch.nan
    y = compiled(x, weights, biases)
    hit = torch.zeros(2, 12, 12, 30, dtype=torch.bool)
    hit[1, :, 4:9, 13:18] = True
    assert torch.equal(y.isnan(), hit)
    assert torch.equal(y[~hit], clean[~hit])


# ---- the same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [F32, BF16], ids=str)
@pytest.mark.parametrize("net", [NETS[0], NETS[1], NETS[4]], ids=["subnet", "odd", "wide"])
def test_bits_depend_on_nothing_but_the_numbers(isa, net, compute):
    weights, biases = network(*net)
    x = torch.randn(3, net[0], 21, 37)
    y = compiled(x, weights, biases, compute_dtype=compute)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(compiled(x, weights, biases, compute_dtype=compute), y), f"{count} threads"
    finally:
        torch.set_num_threads(threads)
    for sample in range(3):
        assert torch.equal(compiled(x[sample : sample + 1], weights, biases, compute_dtype=compute)[0], y[sample])
    last = compiled(x.to(memory_format=torch.channels_last), weights, biases, compute_dtype=compute)
    assert torch.equal(last, y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous()
    # a pixel further from the border than the layers see does not know where in its row and tile it lies
    depth = len(net[1])
    crop = compiled(x[..., 3:-2, 5:-4], weights, biases, compute_dtype=compute)
    assert torch.equal(crop[..., depth:-depth, depth:-depth], y[..., 3 + depth : -2 - depth, 5 + depth : -4 - depth])


def test_parts_strides_and_weight_layouts(isa):
    weights, biases = network(7, (9, 4))
    x = torch.randn(2, 7, 10, 19)
    y = compiled(x, weights, biases)
    key = torch.randn(1, 3, 10, 19)
    shared = torch.cat([x[:, :4], key.expand(2, -1, -1, -1)], 1)
    for parts in ([x], list(x.split([4, 3], 1)), list(x.split([1, 5, 1], 1)), [x.mT.contiguous().mT]):
        assert torch.equal(compiled(parts, weights, biases), y)
    assert torch.equal(compiled([x[:, :4], key], weights, biases), compiled(shared, weights, biases))
    assert torch.equal(compiled([key, x[:, 3:]], weights, biases)[1], compiled([key, x[1:, 3:]], weights, biases)[0])
    strided = [w.to(memory_format=torch.channels_last) for w in weights]
    assert torch.equal(compiled(x, strided, [b.repeat(2)[: len(b)] for b in biases]), y)
    doubled = torch.randn(2, 14, 20, 38)
    every_second = doubled[:, ::2, ::2, ::2]
    assert torch.equal(compiled(every_second, weights, biases), compiled(every_second.contiguous(), weights, biases))


def test_the_kept_work_buffer_leaks_nothing_from_call_to_call(isa):
    nets = [network(16, SUBNET), network(3, (5, 7, 1)), network(16, SUBNET)]
    inputs = [torch.randn(1, 16, 9, 9), torch.randn(2, 3, 40, 33), torch.randn(1, 16, 30, 41)]
    inputs[2][0, 0, 0, 0] = torch.inf
    first = [compiled(x, *net) for x, net in zip(inputs, nets, strict=True)]
    for _ in range(2):
        for x, net, y in zip(inputs, nets, first, strict=True):
            assert torch.equal(compiled(x, *net).nan_to_num(), y.nan_to_num())
    with ThreadPoolExecutor(4) as pool:  # calls at the same time have buffers of their own
        for k, y in enumerate(pool.map(lambda k: dense_block(inputs[k % 3], *nets[k % 3]), range(24))):
            assert torch.equal(y.nan_to_num(), first[k % 3].nan_to_num())


# ---- paths, errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)], ids=str)
@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_empty(path, shape):
    weights, biases = network(3, (4, 2))
    with pyface.paths(path):
        assert dense_block(torch.randn(shape), weights, biases).shape == (shape[0], 2, *shape[2:])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_paths_agree_and_are_chosen(layout):
    weights, biases = network(4, (6, 5))
    x = torch.randn(2, 4, 9, 11).contiguous(memory_format=layout)
    with pyface.paths("reference"):
        plain = dense_block(x, weights, biases)
    torch.testing.assert_close(compiled(x, weights, biases), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(dense_block(x, weights, biases), compiled(x, weights, biases))
    assert plain.is_contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype=BF16), pyface.paths("reference"):
        assert torch.equal(dense_block(x, weights, biases), plain)


def test_a_path_says_why_it_cannot_serve():
    weights, biases = network(4, (6, 5), torch.float64)
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    with pytest.warns(UserWarning, match="reference path .* does not take float64"):  # once, so only here
        assert dense_block(x, weights, biases).dtype == torch.float64
    with pytest.raises(pyface.ops.PathError, match="does not take float64"):
        compiled(x, weights, biases)
    with pytest.raises(pyface.ops.PathError, match="no cuda path"), pyface.paths("cuda"):
        dense_block(x, weights, biases)


def test_bfloat16_is_left_to_onednn_on_a_cpu_with_matrix_units(monkeypatch):
    core = importlib.import_module("pyface.ops.dense_block")
    weights, biases = network(4, (6, 5))
    x = torch.randn(1, 4, 9, 11)
    for has_amx, compute, path in [(True, BF16, "reference"), (True, F32, "cpu"), (False, BF16, "cpu")]:
        monkeypatch.setattr(core, "_has_amx", lambda has_amx=has_amx: has_amx)
        with pyface.paths(path):
            expected = dense_block(x, weights, biases, compute_dtype=compute)
        assert torch.equal(dense_block(x, weights, biases, compute_dtype=compute), expected)
        assert torch.equal(expected, compiled(x, weights, biases, compute_dtype=compute)) == (path == "cpu")


def test_errors_name_what_is_wrong():
    weights, biases = network(3, (4, 2))
    x = torch.randn(1, 3, 5, 5)
    small = torch.randn(4, 3, 1, 1)
    cases = [
        (ValueError, r"weights\[0\] must be Tensor\[G, 4, 3, 3\]", (torch.randn(1, 4, 5, 5), weights, biases)),
        (ValueError, r"weights\[1\] must be Tensor\[G, 7, 3, 3\]", (x, [weights[0], weights[0]], [biases[0]] * 2)),
        (ValueError, r"weights\[0\] must be .* got shape \(4, 3, 1, 1\)", (x, [small, weights[1]], biases)),
        (ValueError, r"biases\[1\] must be Tensor\[2\]", (x, weights, [biases[0], biases[0]])),
        (ValueError, "as many biases as weights", (x, weights, biases[:1])),
        (ValueError, "at least one each", (x, [], [])),
        (ValueError, "at least one each", ([], weights, biases)),
        (ValueError, r"x must be Tensor\[B, C, H, W\]", (x[0], weights, biases)),
        (ValueError, r"x must be Tensor\[B, C, H, W\] with C >= 1", (x[:, :0], weights, biases)),
        (ValueError, "one height and width", ([x[:, :2], x[:, 2:, 1:]], weights, biases)),
        (ValueError, "one batch size or 1", ([x.expand(3, -1, -1, -1), x.expand(2, -1, -1, -1)], weights, biases)),
        (ValueError, "on one device, got cpu, meta", (x.to("meta"), weights, biases)),
        (TypeError, "x must have one floating-point type", ([x[:, :1].bfloat16(), x[:, 1:]], weights, biases)),
        (TypeError, "x must have one floating-point type, got torch.int64", (x.long(), weights, biases)),
        (TypeError, "weights and biases must have one", (x, weights, [b.bfloat16() for b in biases])),
    ]
    for kind, message, args in cases:
        with pytest.raises(kind, match=message):
            dense_block(*args)
    with pytest.raises(TypeError, match="compute_dtype must be a floating-point type"):
        dense_block(x, weights, biases, compute_dtype=torch.int32)


def test_a_gradient_is_refused_where_it_would_be_needed():
    weights, biases = network(3, (4, 2))
    x = torch.randn(1, 3, 5, 5)
    y = dense_block(x, weights, biases)
    for leaf in (x, weights[1], biases[0]):
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match="no gradient.*no_grad.*DenseSubnet"):
            dense_block(x, weights, biases)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(dense_block(x, weights, biases), y)
        leaf.requires_grad_(False)


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_opcheck(path, layout):
    weights, biases = network(6, (5, 7))
    for batch in (2, 0):
        parts = [torch.randn(batch, channels, 5, 9).contiguous(memory_format=layout) for channels in (4, 2)]
        args = (parts, weights, biases, 0.01, BF16, path)
        torch.library.opcheck(torch.ops.pyface.dense_block.default, args)


def test_compiles_to_one_graph():
    weights, biases = network(6, (5, 7))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(weights)
            self.biases = torch.nn.ParameterList(biases)

        def forward(self, a, b):
            return dense_block((a, b), list(self.weights), list(self.biases), compute_dtype=BF16) * 2

    net, (a, b) = Net(), torch.randn(2, 6, 5, 9).split([4, 2], 1)
    with torch.no_grad():
        expected = net(a, b)
        graph = torch.compile(net, fullgraph=True, backend="aot_eager")
        assert torch.equal(graph(a, b), expected)


def test_is_in_the_table():
    rows = {row["path"]: row for row in pyface.ops.table() if row["core"] == "dense_block"}
    assert [path for path, row in rows.items() if row["usable"]] == ["cpu", "reference"]
    assert rows["triton"]["reasons"] == ["core dense_block has no triton path"]
    core = importlib.import_module("pyface.ops.dense_block").CORE
    assert "these are on cuda" in core.reasons("cpu", "cuda", (F32, F32, F32), explicit=True)[0]


# ---- the core by itself ---------------------------------------------------------------------------------------------


def test_core_under_sanitizers(sanitized):
    sanitized("dense_block", "-O1")
