"""csrc/cuda/coupling.cu, run on the CPU under AddressSanitizer and UBSan (tests/cuda_emulation), against float64."""

import itertools

import pytest
import torch
from coupling_expected import (
    ACTIVATIONS,
    BF16,
    DTYPE_CODES,
    F16,
    F32,
    F64,
    PAIR_IDS,
    TYPE_PAIRS,
    check_backward,
    check_forward,
    check_haar,
    check_inverse_haar,
    log_det_type,
)
from cuda_emulation import CSRC, HERE, build, compiler, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX or g++) to build the emulation with")

FORWARD, BACKWARD, HAAR = range(3)
SIZES = [1, 15, 16, 17, 255, 256, 257, 2047, 2048, 2049]
LAYOUTS = ["dense", "halves", "unaligned"]


@pytest.fixture(scope="module")
def program():
    return build(CSRC / "cuda" / "coupling.cu", HERE / "coupling.cpp")


def samples(batch, inner, dtype, layout, scale=1.5):
    """Random [batch, inner]: dense, the first half of rows twice as long, or one element off any alignment."""
    row = {"dense": inner, "halves": 2 * inner, "unaligned": inner}[layout]
    buffer = torch.randn(batch * row + 1) * scale
    buffer = buffer.to(dtype)[1:] if layout == "unaligned" else buffer.to(dtype)[:-1].clone()
    return buffer.view(batch, row)[:, :inner]


def blank(batch, inner, dtype, layout="dense"):
    """As samples, filled with NaN: what a kernel does not write cannot pass."""
    return samples(batch, inner, dtype, layout).fill_(torch.nan)


def forward_call(x, s, t, y, log_det, *, clamp, activation, inverse):
    batch, inner = x.shape
    strides = [v.stride(0) for v in (x, s, t, y)]
    types = [DTYPE_CODES[x.dtype], DTYPE_CODES[s.dtype]]
    return (
        FORWARD,
        x,
        s,
        t,
        y,
        log_det,
        batch,
        inner,
        *strides,
        *types,
        ACTIVATIONS[activation],
        float(clamp),
        inverse,
    )


def backward_call(grad_out, grad_log_det, value, s, t, grad_x, grad_s, *, clamp, activation, inverse, from_output):
    batch, inner = value.shape
    strides = [v.stride(0) for v in (grad_out, value, s)] + [0 if t is None else t.stride(0)]
    types = [DTYPE_CODES[value.dtype], DTYPE_CODES[s.dtype]]
    tensors = (grad_out, grad_log_det, value, s, t, grad_x, grad_s)
    options = (ACTIVATIONS[activation], float(clamp), inverse, from_output)
    return (BACKWARD, *tensors, batch, inner, *strides, *types, *options)


def forward(program, x, s, t, *, log_det=True, clamp=2.0, activation="sigmoid", inverse=False, **how):
    """y and log_det (None when not asked for) of one call."""
    y = torch.full(x.shape, torch.nan, dtype=x.dtype)
    total = torch.full((len(x),), torch.nan, dtype=log_det_type(x.dtype)) if log_det else None
    call = forward_call(x, s, t, y, total, clamp=clamp, activation=activation, inverse=inverse)
    assert run(program, [call], **how) == [0]
    return y, total


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
def test_forward(program, types, activation):
    cases = []
    for inner, layout, inverse in itertools.product(SIZES, LAYOUTS, [False, True]):
        x, s, t = (samples(3, inner, dtype, layout) for dtype in (types[0], types[1], types[1]))
        y = blank(3, inner, types[0], layout)
        log_det = blank(1, 3, log_det_type(types[0]))[0] if (inner + inverse) % 2 else None
        cases.append((x, s, t, y, log_det, dict(clamp=1.7, activation=activation, inverse=inverse)))
    assert not any(run(program, [forward_call(*tensors, **options) for *tensors, options in cases]))
    for *tensors, options in cases:
        check_forward(*tensors, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
def test_backward(program, types, activation):
    cases = []
    modes = [(False, False), (False, True), (True, False)]
    wanted = itertools.cycle([(True, True), (True, False), (True, True), (False, True)])  # 4 against 3 modes
    for inner, layout, (inverse, from_output) in itertools.product(SIZES, LAYOUTS, modes):
        grad_out, value = (samples(3, inner, types[0], layout) for _ in range(2))
        s, t = (samples(3, inner, types[1], layout) for _ in range(2))
        lam = None if inner == 16 else torch.randn(3, dtype=log_det_type(types[0]))
        needs_x, needs_s = next(wanted)
        grad_x = blank(3, inner, types[0]) if needs_x else None
        grad_s = blank(3, inner, types[1]) if needs_s else None
        options = dict(clamp=1.7, activation=activation, inverse=inverse, from_output=from_output)
        cases.append((grad_out, lam, value, s, t if from_output else None, grad_x, grad_s, options))
    assert not any(run(program, [backward_call(*tensors, **options) for *tensors, options in cases]))
    for *tensors, options in cases:
        check_backward(*tensors, **options)


@pytest.mark.parametrize("inner", [1024 * 256, 1024 * 256 + 1], ids=["one tile a range", "two tiles a range"])
def test_log_det_over_all_ranges(program, inner):
    x, s, t = (samples(1, inner, F32, "dense") for _ in range(3))
    y, log_det = forward(program, x, s, t)
    check_forward(x, s, t, y, log_det, clamp=2.0, activation="sigmoid", inverse=False)
    exact = torch.tanh(s.double() / 2).mul(2).sum()
    assert abs(log_det.item() - exact) <= max(1e-6, 1e-6 * abs(exact))  # no drift over a quarter of a million terms


@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
def test_sample_has_the_same_bits_alone_in_any_place_and_in_any_thread_order(program, types):
    inner = 777
    x, s, t = (samples(5, inner, dtype, "dense") for dtype in (types[0], types[1], types[1]))
    s[2, 100] = torch.nan
    y, log_det = forward(program, x, s, t, order="ascending")
    assert log_det[2].isnan()
    assert y[2].isnan().sum() == 1
    assert not y[[0, 1, 3, 4]].isnan().any()
    for b in (0, 3):
        # alone, unaligned, as a view of the batch and the other way round in time
        alone_y, alone = forward(program, x[b : b + 1], s[b : b + 1].clone(), t[b : b + 1], order="descending")
        assert torch.equal(alone, log_det[b : b + 1])
        assert torch.equal(alone_y[0], y[b])
    turned = forward(program, x.flip(0), s.flip(0), t.flip(0), seed=7)
    assert torch.equal(turned[1].flip(0).nan_to_num(), log_det.nan_to_num())
    assert torch.equal(turned[0].flip(0).nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
def test_inverse_undoes_forward_and_its_log_det_is_the_negative(program, types, activation):
    x, s, t = (samples(2, 1300, dtype, "halves", scale=1.0) for dtype in (types[0], types[1], types[1]))
    y, log_det = forward(program, x, s, t, activation=activation)
    back, negative = forward(program, y, s, t, activation=activation, inverse=True)
    assert torch.equal(log_det, -negative)
    # y is rounded to its own type and then stretched by exp(-l); `none` has no bound but that of the data
    bound = s.double().abs().amax() if activation == "none" else torch.tensor(2.0)
    largest = torch.cat([y, t.to(y.dtype)]).double().abs().amax()
    allowed = 4 * torch.finfo(types[0]).eps * torch.exp(bound) * (largest + x.double().abs().amax())
    assert (back.double() - x.double()).abs().amax() <= allowed


@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "atan"])
def test_log_scale_is_odd_bounded_and_monotone(program, activation, types):
    magnitudes = torch.cat([torch.logspace(-7, 4, 150), torch.tensor([1e30, torch.inf])]).to(types[1]).unique()
    s = torch.cat([-magnitudes.flip(0), magnitudes]).view(-1, 1)
    zeros = torch.zeros(s.shape, dtype=types[0])
    _, scale = forward(program, zeros, s, zeros.to(types[1]), activation=activation)
    assert torch.equal(scale, -scale.flip(0))
    assert (scale.diff() >= 0).all()
    assert scale.abs().amax() <= 2
    limit = 0.636 * torch.pi if activation == "atan" else 2.0
    assert scale[-1].item() == pytest.approx(limit, rel=1e-7 if activation == "atan" else 0)


def test_small_log_scales_keep_their_relative_accuracy(program):
    s = torch.logspace(-12, -2, 200).view(-1, 1)
    zeros = torch.zeros_like(s)
    for activation, slope in [("sigmoid", 0.5), ("tanh", 1.0), ("atan", 0.636)]:
        _, scale = forward(program, zeros, s, zeros, activation=activation, clamp=1.0)
        argument = s.double() / 2 if activation == "sigmoid" else s.double()
        exact = 0.636 * torch.atan(argument) if activation == "atan" else torch.tanh(argument)
        assert (scale.double() / exact[:, 0] - 1).abs().amax() < 4e-7, activation
        assert scale[0].item() == pytest.approx(slope * 1e-12, rel=1e-6)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "atan"])
def test_zero_log_scale_and_zero_clamp_add_the_shift_and_nothing_else(program, activation):
    x, s, t = (samples(2, 70, F32, "dense") for _ in range(3))
    for scale, clamp in [(torch.zeros_like(s), 2.0), (s, 0.0), (torch.full_like(s, torch.inf), 0.0)]:
        for inverse in (False, True):
            y, log_det = forward(program, x, scale, t, clamp=clamp, activation=activation, inverse=inverse)
            assert torch.equal(y, x - t if inverse else x + t)
            assert torch.equal(log_det, torch.zeros(2))
    grad_x, grad_s = blank(2, 70, F32), blank(2, 70, F32)
    options = dict(clamp=0.0, activation=activation, inverse=False, from_output=False)
    assert run(program, [backward_call(x, torch.ones(2), t, s, None, grad_x, grad_s, **options)]) == [0]
    assert torch.equal(grad_x, x)
    assert not grad_s.any()


@pytest.mark.parametrize("types", TYPE_PAIRS, ids=PAIR_IDS)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "atan"])
def test_infinite_log_scale_saturates(program, activation, types):
    x = torch.tensor([[1.5, 1.5, 0.0]]).to(types[0])
    s = torch.tensor([[torch.inf, -torch.inf, -torch.inf]]).to(types[1])
    t = torch.tensor([[0.25, 0.25, 0.75]]).to(types[1])
    y, log_det = forward(program, x, s, t, activation=activation, clamp=1.0)
    assert y.isfinite().all()
    assert y[0, 2] == 0.75
    assert log_det.isfinite().all()
    grad_x, grad_s = blank(1, 3, types[0]), blank(1, 3, types[1])
    lam = torch.ones(1, dtype=log_det_type(types[0]))
    options = dict(clamp=1.0, activation=activation, inverse=False, from_output=False)
    assert run(program, [backward_call(x, lam, x, s, None, grad_x, grad_s, **options)]) == [0]
    assert grad_x.isfinite().all()
    assert not grad_s.any()


def test_not_a_number_and_infinite_x_stay_where_they_are(program):
    x, s, t = (samples(2, 40, F32, "dense") for _ in range(3))
    x[0, 3], t[1, 5] = torch.inf, torch.nan
    y, log_det = forward(program, x, s, t)
    assert y[0, 3] == torch.inf
    assert y[1, 5].isnan()
    assert y.isfinite().sum() == 78
    assert log_det.isfinite().all()


def test_y_may_be_x(program):
    x, s, t = (samples(2, 1000, F32, "dense") for _ in range(3))
    expected, _ = forward(program, x, s, t, log_det=False)
    call = forward_call(x, s, t, x, None, clamp=2.0, activation="sigmoid", inverse=False)
    assert run(program, [call]) == [0]
    assert torch.equal(x, expected)


def test_nothing_to_do(program):
    none = torch.empty(0, 8)
    y, log_det = forward(program, none, none, none)
    assert y.shape == (0, 8)
    assert log_det.shape == (0,)
    no_elements = torch.empty(3, 0)
    y, log_det = forward(program, no_elements, no_elements, no_elements)
    assert y.shape == (3, 0)
    assert torch.equal(log_det, torch.zeros(3))
    options = dict(clamp=2.0, activation="sigmoid", inverse=False, from_output=False)
    gradients = [None, none, none, None, none.clone(), none.clone()]
    assert run(program, [backward_call(none, *gradients, **options), (HAAR, none, none, 0, 3, 4, 4, 0, False)]) == [
        0,
        0,
    ]


def test_unserved_type_pair_is_an_error_code(program):
    x, s = torch.zeros(1, 4), torch.zeros(1, 4, dtype=F64)
    invalid_value = 1
    call = forward_call(x, s, s, x.clone(), None, clamp=2.0, activation="sigmoid", inverse=False)
    assert run(program, [call]) == [invalid_value]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_haar(program, dtype):
    calls, checks = [], []
    for batch, channels, rows, cols in [(1, 1, 1, 1), (2, 3, 4, 16), (3, 2, 5, 7), (1, 3, 16, 24), (2, 1, 3, 33)]:
        for offset in (0, 1):
            count = 4 * batch * channels * rows * cols
            source = torch.randn(count + offset).to(dtype)[offset:]
            result = torch.full((count + offset,), torch.nan, dtype=dtype)[offset:]
            image, bands = (batch, channels, 2 * rows, 2 * cols), (batch, 4 * channels, rows, cols)
            for inverse in (False, True):
                out = result.clone() if inverse else result
                calls.append((HAAR, source, out, batch, channels, rows, cols, DTYPE_CODES[dtype], inverse))
                shapes = (bands, image) if inverse else (image, bands)
                checks.append(
                    (check_inverse_haar if inverse else check_haar, source.view(shapes[0]), out.view(shapes[1]))
                )
    assert not any(run(program, calls))
    for check, source, out in checks:
        check(source, out)


def test_haar_is_exact_on_integers(program):
    image = torch.randint(-(2**20), 2**20, (2, 3, 8, 12)).float()
    bands, back = torch.full((2, 12, 4, 6), torch.nan), torch.full_like(image, torch.nan)
    assert run(program, [(HAAR, image, bands, 2, 3, 4, 6, 0, False)]) == [0]
    assert run(program, [(HAAR, bands, back, 2, 3, 4, 6, 0, True)]) == [0]
    assert torch.equal(back, image)
