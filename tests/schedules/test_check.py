"""The checker itself finds what is wrong, and keeps time."""

from collections.abc import Iterator

import numpy as np
import pytest

from allreduce_sgd.schedules import ring
from allreduce_sgd.schedules.check import ScheduleError, check_columns, execute
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.step import NOTHING, Column, Schedule, Step
from tests.schedules.inputs import integers


def wrong(*steps: tuple[Step, ...]) -> Schedule:
    """A schedule that gives rank r the r-th tuple of steps."""
    return lambda rank, size, length: iter(steps[rank])


def test_checker_finds_a_wrong_sum_through_a_doubled_reduction() -> None:
    def doubled(rank: int, size: int, length: int) -> Iterator[Step]:
        yield from ring.reduce_scatter(rank, size, length)
        yield from ring.reduce_scatter(rank, size, length)
        yield from ring.all_gather(rank, size, length)

    buffers = integers(3, 6)
    assert not np.array_equal(execute(doubled, buffers).buffers[0], np.sum(buffers, axis=0))


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (((Step(1, slice(0, 2), None, NOTHING, False),), ()), "deadlock"),
        (((Step(None, NOTHING, 1, slice(0, 2), False),), (Step(None, NOTHING, 0, slice(0, 2), False),)), "deadlock"),
        (
            ((Step(1, slice(0, 2), None, NOTHING, False),), (Step(None, NOTHING, 0, slice(0, 1), False),)),
            "rank 0 sends",
        ),
        (((Step(1, slice(0, 9), None, NOTHING, False),), ()), "leaves the buffer"),
        (((Step(0, slice(0, 2), None, NOTHING, False),), ()), "itself"),
        (((Step(None, slice(0, 2), None, NOTHING, False),), ()), "no peer"),
        (((Step(1, slice(0, 2), 1, slice(1, 3), False),), ()), "overwrites what it sends"),
    ],
)
def test_checker_refuses_a_wrong_schedule(steps: tuple[tuple[Step, ...], ...], text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        execute(wrong(*steps), integers(2, 4))


def test_sends_that_need_buffering_are_a_deadlock() -> None:
    # Both send first and receive afterwards: works only where MPI buffers, which it need not.
    def both_send_first(rank: int, size: int, length: int) -> Iterator[Step]:
        yield Step(1 - rank, slice(0, length), None, NOTHING, False)
        yield Step(None, NOTHING, 1 - rank, slice(0, length), True)

    with pytest.raises(ScheduleError, match="deadlock"):
        execute(both_send_first, integers(2, 4))


def test_what_comes_is_combined_only_after_the_own_send() -> None:
    def exchange(rank: int, size: int, length: int) -> Iterator[Step]:
        yield Step(1 - rank, slice(0, length), 1 - rank, slice(0, length), reduce=True)

    buffers = integers(2, 4)
    np.testing.assert_array_equal(execute(exchange, buffers).buffers, np.tile(np.sum(buffers, axis=0), (2, 1)))


def test_the_dtype_of_the_buffers_is_kept() -> None:
    done = execute(ring.ring, [np.full(5, 0.5, np.float32)] * 3)
    assert [buffer.dtype for buffer in done.buffers] == [np.float32] * 3
    np.testing.assert_array_equal(done.buffers[1], np.full(5, 1.5, np.float32))


def test_a_message_begins_when_both_its_ranks_are_there_and_is_combined_at_the_end() -> None:
    steps = (
        (Step(1, slice(0, 2), None, NOTHING, False), Step(None, NOTHING, 2, slice(0, 1), True)),
        (Step(None, NOTHING, 0, slice(0, 2), True),),
        (Step(0, slice(0, 1), None, NOTHING, False),),
    )
    done = execute(wrong(*steps), [np.ones(4, np.float32)] * 3, LinkCost(100.0, 10.0, 1.0))
    first, second = 100 + 10 * 8, 100 + 10 * 4
    assert done.seconds == [first + second + 4, first + 8, first + second]


def test_columns_of_another_schedule_are_refused() -> None:
    with pytest.raises(ScheduleError, match="round 1 of 3 ranks: rank 0 has"):
        check_columns(ring.all_gather_columns, ring.reduce_scatter, 3, 7)
    with pytest.raises(ScheduleError, match=r"ranks \[0, 1, 2\] have steps left"):
        check_columns(ring.reduce_scatter_columns, ring.ring, 3, 7)
    with pytest.raises(ScheduleError, match=r"round 3 of 3 ranks: rank 0 has .* its schedule None"):
        check_columns(ring.columns, ring.reduce_scatter, 3, 7)


@pytest.mark.parametrize("field", ["send_to", "recv_from", "send_stop", "recv_start", "sends", "receives"])
def test_a_round_in_which_sends_and_receives_do_not_meet_is_refused(field: str) -> None:
    def broken(size: int, length: int) -> Iterator[Column]:
        for column in ring.columns(size, length):
            entries = getattr(column, field).copy()
            entries[0] = (entries[0] + 1) % size if field in ("send_to", "recv_from") else not entries[0]
            yield column._replace(**{field: entries})

    with pytest.raises(ScheduleError, match="do not match"):
        check_columns(broken, ring.ring, 3, 9)


def test_a_column_of_another_shape_is_refused() -> None:
    def broken(size: int, length: int) -> Iterator[Column]:
        for column in ring.columns(size, length):
            yield column._replace(reduce=column.reduce[1:])

    with pytest.raises(ScheduleError, match="reduce has shape"):
        check_columns(broken, ring.ring, 3, 9)
