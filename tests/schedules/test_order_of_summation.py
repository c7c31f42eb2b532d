"""The bits of a float32 sum: equal on all ranks, and where the order of summation allows it, however buffers are cut.

What --deterministic rests on: it takes only algorithms whose bits do not depend on bucket and segment sizes.
"""

import numpy as np
import numpy.typing as npt
import pytest

from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.check import execute
from tests.schedules.inputs import wide_floats

LENGTH = 331
Floats = npt.NDArray[np.float32]


def reduced(name: str, buffers: list[Floats], segment: int | None = None) -> list[Floats]:
    return execute(ALL_REDUCE[name].schedule(segment), buffers).buffers


def reduced_in_pieces(name: str, buffers: list[Floats], piece: int, segment: int | None = None) -> Floats:
    """Reduce pieces of the buffers one by one, as buckets are, and put rank 0's results together again."""
    starts = range(0, len(buffers[0]), piece)
    return np.concatenate(
        [reduced(name, [buffer[start : start + piece] for buffer in buffers], segment)[0] for start in starts]
    )


@pytest.mark.parametrize("size", [3, 4, 5, 6, 8, 11, 13, 16])
@pytest.mark.parametrize("name", sorted(ALL_REDUCE))
def test_bits_depend_on_where_a_buffer_is_cut_just_where_the_catalogue_says_so(name: str, size: int) -> None:
    buffers = wide_floats(size, LENGTH)
    whole = reduced(name, buffers)[0].tobytes()
    cut = {reduced_in_pieces(name, buffers, piece, segment).tobytes() for piece, segment in ((37, None), (101, 9))}
    cut.add(reduced_in_pieces(name, buffers, 3).tobytes())
    assert (cut == {whole}) is ALL_REDUCE[name].order_free_of_chunks


@pytest.mark.parametrize("size", range(1, 34))
def test_recursive_doubling_halving_doubling_and_tree_give_the_same_bits(size: int) -> None:
    buffers = wide_floats(size, LENGTH)
    results = [reduced(name, buffers) for name in ("recursive-doubling", "halving-doubling", "tree")]
    assert len({buffer.tobytes() for result in results for buffer in result}) == 1
    np.testing.assert_allclose(results[0][0], np.sum(buffers, axis=0, dtype=np.float64), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("size", [2, 3, 7, 8, 12])
@pytest.mark.parametrize("name", sorted(ALL_REDUCE))
def test_all_ranks_have_equal_bits_with_any_segment_size(name: str, size: int) -> None:
    buffers = wide_floats(size, LENGTH)
    results = [reduced(name, buffers, segment) for segment in (None, 100, 7)]
    assert len({buffer.tobytes() for result in results for buffer in result}) == 1


def test_the_order_of_the_sum_shows_in_the_bits_of_these_buffers() -> None:
    buffers = wide_floats(5, LENGTH)
    assert reduced("chain", buffers)[0].tobytes() != reduced("tree", buffers)[0].tobytes()
