"""The halves of the ring on their own."""

import numpy as np
import pytest

from allreduce_sgd.schedules import ring
from allreduce_sgd.schedules.check import check_columns, execute
from allreduce_sgd.schedules.step import chunk
from tests.schedules.inputs import integers

SIZES = range(1, 34)


def lengths(size: int) -> list[int]:
    return [0, 1, size - 1, size, size + 1, 3 * size + 1]


def elements(piece: slice) -> int:
    return piece.stop - piece.start


@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_leaves_each_rank_its_chunk(size: int) -> None:
    for length in lengths(size):
        buffers = integers(size, length)
        done = execute(ring.reduce_scatter, buffers)
        expected = np.sum(buffers, axis=0)
        for rank in range(size):
            own = chunk(length, size, rank)
            np.testing.assert_array_equal(done.buffers[rank][own], expected[own])
            assert done.steps[rank] == size - 1
            assert done.elements_sent[rank] == (length - elements(own) if size > 1 else 0)
        assert check_columns(ring.reduce_scatter_columns, ring.reduce_scatter, size, length) == size - 1


@pytest.mark.parametrize("size", SIZES)
def test_all_gather_collects_the_chunks(size: int) -> None:
    for length in lengths(size):
        buffers = integers(size, length)
        done = execute(ring.all_gather, buffers)
        expected = np.concatenate([buffers[rank][chunk(length, size, rank)] for rank in range(size)])
        for rank in range(size):
            np.testing.assert_array_equal(done.buffers[rank], expected)
            assert done.steps[rank] == size - 1
            assert done.elements_sent[rank] == (length - elements(chunk(length, size, rank + 1)) if size > 1 else 0)
        assert check_columns(ring.all_gather_columns, ring.all_gather, size, length) == size - 1


@pytest.mark.parametrize("size", SIZES)
def test_no_all_reduce_can_send_less(size: int) -> None:
    length = 4 * size
    done = execute(ring.ring, integers(size, length))
    assert done.elements_sent == [2 * (size - 1) * length // size] * size
