"""Every all-reduce algorithm is executed for many rank counts and lengths, and held against its closed forms.

Its columnar form is held against the generator for the same cases.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allreduce_sgd.schedules.catalogue import ALL_REDUCE, cheapest
from allreduce_sgd.schedules.check import check_columns, execute
from allreduce_sgd.schedules.cost import LinkCost
from tests.schedules.inputs import integers

NAMES = sorted(ALL_REDUCE)
SIZES = range(1, 34)


def lengths(size: int) -> list[int]:
    return sorted({0, 1, size - 1, size, size + 1, 2 * size + 1, 5 * size + 3})


def segments(name: str, size: int) -> list[int | None]:
    if not ALL_REDUCE[name].segmented:
        return [None]
    # All cuts where the checker is fast; with more ranks the one that is neither the whole nor a single element.
    return [None, 1, 2, 1000] if size <= 9 else [2]


def check(name: str, size: int, length: int, segment: int | None) -> None:
    algorithm = ALL_REDUCE[name]
    buffers = integers(size, length)
    done = execute(algorithm.schedule(segment), buffers)
    np.testing.assert_array_equal(done.buffers, np.tile(np.sum(buffers, axis=0), (size, 1)))
    ranks = range(size)
    assert done.steps == [algorithm.step_count(rank, size, length, segment) for rank in ranks]
    assert done.elements_sent == [algorithm.elements_sent(rank, size, length) for rank in ranks]
    check_columns(algorithm.columns(segment), algorithm.schedule(segment), size, length)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_get_the_sum_with_the_steps_and_elements_of_the_closed_forms(name: str, size: int) -> None:
    for length in lengths(size):
        for segment in segments(name, size):
            check(name, size, length, segment)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.sampled_from(NAMES), st.integers(1, 33), st.integers(0, 300), st.none() | st.integers(1, 40))
def test_any_length_and_segment_will_do(name: str, size: int, length: int, segment: int | None) -> None:
    if segment is not None:
        # Not more than a few dozen segments, which the checker runs through one by one.
        segment = max(segment, length // 30)
    check(name, size, length, segment)


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_that_is_not_segmented_ignores_the_segment_size(name: str) -> None:
    whole, cut = (
        [list(ALL_REDUCE[name].schedule(segment)(rank, 5, 100)) for rank in range(5)] for segment in (None, 3)
    )
    assert (whole == cut) is not ALL_REDUCE[name].segmented


@pytest.mark.parametrize("name", [name for name in NAMES if ALL_REDUCE[name].segmented])
def test_a_segmented_algorithm_refuses_a_segment_without_elements(name: str) -> None:
    with pytest.raises(ValueError, match="segment is 0 elements"):
        list(ALL_REDUCE[name].schedule(0)(0, 3, 8))


def test_a_ring_in_one_segment_is_the_ring() -> None:
    for rank in range(5):
        ring = list(ALL_REDUCE["ring"].schedule(None)(rank, 5, 23))
        assert list(ALL_REDUCE["segmented-ring"].schedule(None)(rank, 5, 23)) == ring
        assert list(ALL_REDUCE["segmented-ring"].schedule(5)(rank, 5, 23)) == ring


@pytest.mark.parametrize("name", ["halving-doubling", "recursive-doubling", "tree"])
def test_thousands_of_ranks_have_columns_of_logarithmic_number(name: str) -> None:
    size = 16384
    assert sum(1 for _ in ALL_REDUCE[name].columns(None)(size, 10 * size)) == {"recursive-doubling": 14}.get(name, 28)


@pytest.mark.parametrize("name", ["ring", "segmented-ring", "chain"])
def test_columns_of_thousands_of_ranks_meet_in_every_round(name: str) -> None:
    size = 4096
    for number, column in enumerate(ALL_REDUCE[name].columns(1000)(size, 5000 * size)):
        senders = np.flatnonzero(column.sends)
        assert np.array_equal(column.recv_from[column.send_to[senders]], senders)
        if number == 50:
            break


def test_the_catalogue_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ALL_REDUCE["ring"] = ALL_REDUCE["tree"]  # type: ignore[index]


def test_the_cheapest_has_few_steps_for_short_buffers_and_few_bytes_for_long_ones() -> None:
    link = LinkCost(1e-5, 1e-9, 1e-10)
    assert cheapest(8, 64, link, NAMES) == "recursive-doubling"
    assert cheapest(8, 1e8, link, ["ring", "tree", "recursive-doubling"]) == "ring"
    assert cheapest(8, 1e6, link, ["ring", "halving-doubling"]) == "halving-doubling"
    # With a fold, halving-doubling moves the whole buffer twice more, and the ring wins again.
    assert cheapest(7, 1e8, link, ["ring", "halving-doubling"]) == "ring"


def test_the_cheapest_of_equals_is_the_first_named() -> None:
    assert cheapest(1, 1000, LinkCost(1e-5, 1e-9, 0.0), NAMES) == NAMES[0]
    assert cheapest(1, 1000, LinkCost(1e-5, 1e-9, 0.0), NAMES[::-1]) == NAMES[-1]
    assert cheapest(2, 1000, LinkCost(0.0, 1e-9, 0.0), ["halving-doubling", "ring"]) == "halving-doubling"


def test_the_cheapest_refuses_unknown_names() -> None:
    with pytest.raises(KeyError, match="butterfly"):
        cheapest(4, 1000, LinkCost(1e-5, 1e-9, 0.0), ["ring", "butterfly"])
