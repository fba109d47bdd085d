"""The sheet's worked example, the laws between the three measures, and inputs that are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyface.errors import UserError
from pyface.metrics import AdaptiveAccuracy, CompleteSequenceMatch, FixedAccuracy

TARGET = torch.tensor([[1, 2, 4, 0, 0], [3, 1, 0, 0, 0], [0, 0, 0, 0, 0], [5, 2, 0, 0, 0]])
PREDICTED = torch.tensor([[1, 2, 4, 0, 0], [3, 4, 1, 0, 0], [5, 0, 0, 0, 0], [5, 2, 0, 0, 0]])


def test_worked_example():
    assert FixedAccuracy()(PREDICTED, TARGET).item() == pytest.approx(17 / 20)
    assert AdaptiveAccuracy()(PREDICTED, TARGET).item() == pytest.approx(6 / 9)
    result = CompleteSequenceMatch()(PREDICTED, TARGET)
    assert list(result) == ["csm", "csm@1", "csm@2", "csm@3", "csm@4", "csm@5"]
    assert [value.item() for value in result.values()] == pytest.approx([0.5, 0.75, 0.5, 0.5, 0.5, 0.5])


def test_adaptive_counts_an_untouched_face_found_untouched_as_one_right_position():
    nothing = torch.zeros(2, 5, dtype=torch.long)
    metric = AdaptiveAccuracy()
    metric.update(nothing, nothing)
    metric.update(torch.tensor([[1, 2, 0, 0, 0]]), torch.tensor([[2, 1, 0, 0, 0]]))
    assert metric.compute() == 0.5  # 2 of 2 and 0 of 2


def test_adaptive_does_not_count_a_zero_inside_a_prediction():
    # two non-zero ids on either side, so only the first two positions count: 1 right of 2
    assert AdaptiveAccuracy()(torch.tensor([[1, 0, 2, 0, 0]]), torch.tensor([[1, 2, 0, 0, 0]])).item() == 0.5


def test_a_shift_costs_positions_but_only_one_image():
    target, shifted = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 1, 2, 3, 4]])
    assert FixedAccuracy()(shifted, target) == 0
    metric = CompleteSequenceMatch()
    metric.update(shifted, target)
    metric.update(target, target)
    assert metric.compute()["csm"] == 0.5


def test_the_rule_can_be_replaced():
    def forged_only(predicted, target):
        forged = target.any(1)
        return (predicted[forged] == target[forged]).all(1, keepdim=True).expand(-1, 5)

    # image 3 is untouched and leaves the count: 2 of 3
    assert CompleteSequenceMatch(rule=forged_only)(PREDICTED, TARGET)["csm"].item() == pytest.approx(2 / 3)


sequences = st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(sequences, st.randoms())
def test_laws(rows, random):
    target = torch.tensor(rows)
    predicted = torch.tensor([[random.choice((step, 0, 2)) for step in row] for row in rows])
    fixed = FixedAccuracy(4, 3)(predicted, target)
    curve = list(CompleteSequenceMatch(4, 3)(predicted, target).values())
    assert curve[0] == curve[-1] <= fixed
    assert all(early >= late for early, late in zip(curve[1:], curve[2:]))
    assert 0 <= AdaptiveAccuracy(4, 3)(predicted, target) <= 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_is_nan():
    assert FixedAccuracy().compute().isnan()
    assert AdaptiveAccuracy().compute().isnan()
    assert all(value.isnan() for value in CompleteSequenceMatch().compute().values())


@pytest.mark.parametrize("make", [FixedAccuracy, AdaptiveAccuracy, CompleteSequenceMatch])
@pytest.mark.parametrize(
    ("predicted", "target", "says"),
    [
        (PREDICTED[:, :4], TARGET, r"predicted must be an integer Tensor\[N, 5\], got int64 \[4, 4\]"),
        (PREDICTED, TARGET.float(), r"target must be an integer Tensor\[N, 5\], got float32 \[4, 5\]"),
        (PREDICTED + 2, TARGET, "ids from 0 .none. to 5, got 2 to 7"),
        (PREDICTED, TARGET - 1, "ids from 0 .none. to 5, got -1 to 4"),
        (PREDICTED[:3], TARGET, "one length, got 3 and 4"),
    ],
)
def test_wrong_input_is_refused_and_not_counted(make, predicted, target, says):
    metric = make()
    metric.update(PREDICTED, TARGET)
    before = metric.compute()
    with pytest.raises(UserError, match=says):
        metric.update(predicted, target)
    metric._computed = None
    assert metric.compute() == before


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="at least 1, got 0 and 5"):
        FixedAccuracy(steps=0)
