"""Every schedule is executed for all rank counts and lengths, and its steps and bytes are held against closed forms."""

from collections.abc import Iterator

import numpy as np
import pytest

from allreduce_sgd.schedules import ring, tree
from allreduce_sgd.schedules.check import ScheduleError, execute
from allreduce_sgd.schedules.step import NOTHING, Schedule, Step, chunk

SIZES = range(1, 18)


def cases() -> Iterator[tuple[int, int]]:
    for size in SIZES:
        for length in range(3 * size + 2):
            yield size, length


def inputs(size: int, length: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1000 * size + length)
    return [generator.integers(-(2**40), 2**40, length) for _ in range(size)]


def elements(piece: slice) -> int:
    return piece.stop - piece.start


@pytest.mark.parametrize("size", SIZES)
def test_chunks_cover_the_buffer_in_order_and_differ_by_at_most_one(size: int) -> None:
    for length in range(3 * size + 2):
        pieces = [chunk(length, size, index) for index in range(size)]
        assert [index for piece in pieces for index in range(piece.start, piece.stop)] == list(range(length))
        assert max(map(elements, pieces)) - min(map(elements, pieces)) <= 1
        assert chunk(length, size, size + 1) == chunk(length, size, 1)


@pytest.mark.parametrize("size", SIZES)
def test_ring_sums_on_every_rank_with_the_steps_and_bytes_of_the_closed_form(size: int) -> None:
    for length in range(3 * size + 2):
        buffers = inputs(size, length)
        done = execute(ring.ring, buffers)
        expected = np.sum(buffers, axis=0)
        for rank in range(size):
            np.testing.assert_array_equal(done.buffers[rank], expected)
            assert done.steps[rank] == ring.step_count(size)
            assert done.elements_sent[rank] == ring.elements_sent(rank, size, length)
        assert sum(done.elements_sent) == 2 * (size - 1) * length
        if length % size == 0:
            assert done.elements_sent == [2 * (size - 1) * length // size] * size


@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_leaves_each_rank_its_chunk(size: int) -> None:
    for length in range(3 * size + 2):
        buffers = inputs(size, length)
        done = execute(ring.reduce_scatter, buffers)
        expected = np.sum(buffers, axis=0)
        for rank in range(size):
            own = chunk(length, size, rank)
            np.testing.assert_array_equal(done.buffers[rank][own], expected[own])
            assert done.steps[rank] == size - 1
            assert done.elements_sent[rank] == (length - elements(own) if size > 1 else 0)


@pytest.mark.parametrize("size", SIZES)
def test_all_gather_collects_the_chunks(size: int) -> None:
    for length in range(3 * size + 2):
        buffers = inputs(size, length)
        done = execute(ring.all_gather, buffers)
        expected = np.concatenate([buffers[rank][chunk(length, size, rank)] for rank in range(size)])
        for rank in range(size):
            np.testing.assert_array_equal(done.buffers[rank], expected)
            assert done.steps[rank] == size - 1
            assert done.elements_sent[rank] == (length - elements(chunk(length, size, rank + 1)) if size > 1 else 0)


@pytest.mark.parametrize("size", SIZES)
def test_tree_broadcast_reaches_all_in_logarithmic_depth(size: int) -> None:
    for length in range(3 * size + 2):
        buffers = inputs(size, length)
        done = execute(tree.broadcast, buffers)
        for rank in range(size):
            np.testing.assert_array_equal(done.buffers[rank], buffers[0])
            assert done.elements_sent[rank] == length * len(tree.children(rank, size))
            assert done.steps[rank] == len(tree.children(rank, size)) + (rank > 0)
        assert sum(done.elements_sent) == (size - 1) * length
    assert len(tree.children(0, size)) == (size - 1).bit_length()


def wrong(*steps: tuple[Step, ...]) -> Schedule:
    """A schedule that gives rank r the r-th tuple of steps."""
    return lambda rank, size, length: iter(steps[rank])


def test_checker_finds_a_wrong_sum_through_a_doubled_reduction() -> None:
    def doubled(rank: int, size: int, length: int) -> Iterator[Step]:
        yield from ring.reduce_scatter(rank, size, length)
        yield from ring.reduce_scatter(rank, size, length)
        yield from ring.all_gather(rank, size, length)

    buffers = inputs(3, 6)
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
        (((Step(1, slice(0, 2), 1, slice(1, 3), True),), ()), "receives into what it sends"),
    ],
)
def test_checker_refuses_a_wrong_schedule(steps: tuple[tuple[Step, ...], ...], text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        execute(wrong(*steps), inputs(2, 4))


def test_sends_that_need_buffering_are_a_deadlock() -> None:
    # Both send first and receive afterwards: works only where MPI buffers, which it need not.
    def both_send_first(rank: int, size: int, length: int) -> Iterator[Step]:
        yield Step(1 - rank, slice(0, length), None, NOTHING, False)
        yield Step(None, NOTHING, 1 - rank, slice(0, length), True)

    with pytest.raises(ScheduleError, match="deadlock"):
        execute(both_send_first, inputs(2, 4))
