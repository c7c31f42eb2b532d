"""When the validation loss has waited long enough."""

import math

import pytest

from allreduce_sgd.selection.early_stopping import EarlyStopping


def looked(losses: list[float], patience: int, min_delta: float = 0.0) -> tuple[list[bool], int | None]:
    """Return at which losses a new lowest was seen, and after how many of them it asked to stop."""
    rule, lowest = EarlyStopping(patience, min_delta), []
    for count, loss in enumerate(losses, 1):
        lowest.append(rule.look(loss))
        if rule.stop:
            return lowest, count
    return lowest, None


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "lowest", "stopped_after"),
    [
        ([3, 2, 1], 1, 0.0, [True, True, True], None),
        ([3, 3], 1, 0.0, [True, False], 2),
        ([3, 4, 2, 5, 2, 2], 3, 0.0, [True, False, True, False, False, False], 6),
        # Lower, but by too little: kept as the best, though patience goes on.
        ([3, 2.9, 2.8, 2.7], 2, 0.5, [True, True, True], 3),
        # Little by little it comes to more than the least that counts.
        ([3, 2.8, 2.4, 2.3, 1.8], 2, 0.5, [True, True, True, True, True], None),
        ([math.nan, 1, math.nan, math.nan], 2, 0.0, [False, True, False, False], 4),
        ([math.inf, 1], 1, 0.0, [True, True], None),
    ],
)
def test_rule(
    losses: list[float], patience: int, min_delta: float, lowest: list[bool], stopped_after: int | None
) -> None:
    assert looked(losses, patience, min_delta) == (lowest, stopped_after)


def test_goes_on_from_its_state_by_the_present_patience() -> None:
    before = EarlyStopping(2)
    for loss in (1.0, 2.0, 3.0):
        before.look(loss)
    assert before.stop
    after = EarlyStopping(3)
    after.load_state_dict(before.state_dict())
    assert not after.stop
    assert not after.look(1.0)
    assert after.stop
