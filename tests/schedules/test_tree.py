"""Broadcast and reduce along binomial trees."""

import numpy as np
import pytest

from allreduce_sgd.schedules import tree
from allreduce_sgd.schedules.check import check_columns, execute
from tests.schedules.inputs import integers

SIZES = range(1, 34)


def rounds(size: int) -> int:
    return (size - 1).bit_length()


@pytest.mark.parametrize("size", SIZES)
def test_broadcast_reaches_all_in_logarithmic_depth(size: int) -> None:
    for length in (0, 1, 3 * size + 1):
        buffers = integers(size, length)
        done = execute(tree.broadcast, buffers)
        for rank in range(size):
            np.testing.assert_array_equal(done.buffers[rank], buffers[0])
            assert done.elements_sent[rank] == length * len(tree.children(rank, size))
            assert done.steps[rank] == len(tree.children(rank, size)) + (rank > 0)
        assert sum(done.elements_sent) == (size - 1) * length
        assert check_columns(tree.broadcast_columns, tree.broadcast, size, length) == rounds(size)


@pytest.mark.parametrize("size", SIZES)
def test_reduce_gives_rank_0_the_sum_in_logarithmic_depth(size: int) -> None:
    for length in (0, 1, 3 * size + 1):
        buffers = integers(size, length)
        done = execute(tree.reduce, buffers)
        np.testing.assert_array_equal(done.buffers[0], np.sum(buffers, axis=0))
        assert done.elements_sent == [0] + [length] * (size - 1)
        assert done.steps == [tree.reduce_step_count(rank, size) for rank in range(size)]
        assert check_columns(tree.reduce_columns, tree.reduce, size, length) == rounds(size)
