"""How a buffer is cut into chunks and segments."""

import numpy as np
import pytest

from allreduce_sgd.schedules.step import chunk, chunks, segment_count, segment_of


def elements(piece: slice) -> int:
    return piece.stop - piece.start


@pytest.mark.parametrize("parts", range(1, 18))
def test_chunks_cover_the_buffer_in_order_and_differ_by_at_most_one(parts: int) -> None:
    for length in range(3 * parts + 2):
        pieces = [chunk(length, parts, index) for index in range(parts)]
        assert [index for piece in pieces for index in range(piece.start, piece.stop)] == list(range(length))
        assert max(map(elements, pieces)) - min(map(elements, pieces)) <= 1
        assert chunk(length, parts, parts + 1) == chunk(length, parts, 1)


@pytest.mark.parametrize("parts", range(1, 18))
def test_chunks_of_an_array_are_those_of_its_entries(parts: int) -> None:
    for length in range(3 * parts + 2):
        index = np.random.default_rng(length).permutation(parts)
        starts, stops = chunks(length, parts, index)
        assert list(map(slice, starts.tolist(), stops.tolist())) == [chunk(length, parts, each) for each in index]


@pytest.mark.parametrize("segment", [1, 2, 3, 7, 100, None])
def test_segments_cover_a_piece_in_order_and_none_is_too_long(segment: int | None) -> None:
    for start in (0, 5):
        for length in range(16):
            piece = slice(start, start + length)
            cut = [segment_of(piece, segment, index) for index in range(segment_count(length, segment))]
            assert [at for part in cut for at in range(part.start, part.stop)] == list(range(piece.start, piece.stop))
            assert segment is None or max(map(elements, cut)) <= segment
            assert len(cut) == 1 or all(map(elements, cut))


def test_a_segment_beyond_the_end_of_a_piece_is_empty() -> None:
    assert elements(segment_of(slice(4, 6), 2, 1)) == 0


@pytest.mark.parametrize("segment", [0, -3])
def test_a_segment_without_elements_is_refused(segment: int) -> None:
    with pytest.raises(ValueError, match=f"segment is {segment} elements"):
        segment_count(8, segment)
