"""The emulated CUDA finds the mistakes it is there to find, and runs sound kernels."""

import pytest
import torch
from cuda_emulation import HERE, ORDERS, EmulationError, build, compiler, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX or g++) to build the emulation with")

BLOCKS = 3
BLOCK_SUM, NO_BARRIER_AFTER_WRITE, NO_BARRIER_AFTER_READ, WARP_SUM = range(4)
SUM_OF_WARPS, OVERTAKEN_BY_A_WARP, TOO_LARGE = range(11, 14)
STOPPED = {
    4: ("read past the end of global memory", "heap-buffer-overflow"),
    5: ("write past a shared array", "global-buffer-overflow|insufficient space"),
    6: ("misaligned vector access", "misaligned address"),
    7: ("barrier that a thread has left behind", "wait at a barrier that 1 others have left behind"),
    8: ("barriers in two branches", "wait at different barriers"),
    9: ("shuffle without one of its lanes", "has already returned"),
    10: ("launch on another stream", "another stream than the caller's"),
}


@pytest.fixture(scope="module")
def faulty():
    return build(HERE / "faulty.cu")


def sums(program, op, order):
    values = torch.arange(BLOCKS * 64, dtype=torch.float32)
    out = torch.zeros(BLOCKS)
    assert run(program, [(op, values, out, BLOCKS)], order=order) == [0]
    return out, values.view(BLOCKS, 64).sum(1)


@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernels_give_the_right_sums(faulty, order):
    for op in (BLOCK_SUM, SUM_OF_WARPS):
        twice, expected = sums(faulty, op, order)
        assert torch.equal(twice, 3 * expected)
    once, expected = sums(faulty, WARP_SUM, order)
    assert torch.equal(once, expected)


@pytest.mark.parametrize(
    "op",
    [NO_BARRIER_AFTER_WRITE, NO_BARRIER_AFTER_READ, OVERTAKEN_BY_A_WARP],
    ids=["after write", "after read", "between shuffles"],
)
def test_missing_barrier_gives_a_wrong_sum_in_some_order(faulty, op):
    wrong = []
    for order in ORDERS:
        out, expected = sums(faulty, op, order)
        wrong.append(not torch.equal(out, 3 * expected))
    assert any(wrong)


@pytest.mark.parametrize("op", STOPPED, ids=[name for name, _ in STOPPED.values()])
def test_mistake_is_stopped(faulty, op):
    with pytest.raises(EmulationError, match=STOPPED[op][1]):
        run(faulty, [(op, torch.zeros(BLOCKS * 64), torch.zeros(BLOCKS), BLOCKS)])


def test_launch_limits_come_back_as_an_error_code(faulty):
    invalid_configuration = 9
    assert run(faulty, [(TOO_LARGE, torch.zeros(64), torch.zeros(1), 1)]) == [invalid_configuration]
