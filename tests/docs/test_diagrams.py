"""The step diagrams show what the schedules do: the same messages, and buffers that end as full sums."""

import re
from collections import Counter

import pytest

from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from docs.generate.diagrams import DIAGRAMS, draw, progress, rounds

SIZES = (2, 4, 5, 8)
ARROW = re.compile(r'class="message (\w+)" data-round="\d+" data-from="(\d+)" data-to="(\d+)" data-slice="(\d+:\d+)"')


def arrows(name: str, size: int) -> Counter[tuple[str, ...]]:
    return Counter(found.groups() for found in ARROW.finditer(draw(name, size)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_there_is_an_arrow_for_each_message_of_the_schedule(name: str, size: int) -> None:
    length = DIAGRAMS[name].elements(size)
    schedule = ALL_REDUCE[name].schedule(1)
    sent: Counter[tuple[str, ...]] = Counter()
    received: Counter[tuple[str, ...]] = Counter()
    for rank in range(size):
        for step in schedule(rank, size, length):
            if step.send.stop > step.send.start:
                sent[str(rank), str(step.send_to), f"{step.send.start}:{step.send.stop}"] += 1
            if step.recv.stop > step.recv.start:
                how = "reduce" if step.reduce else "copy"
                received[how, str(step.recv_from), str(rank), f"{step.recv.start}:{step.recv.stop}"] += 1
    drawn = arrows(name, size)
    assert drawn == received
    assert Counter({key[1:]: 0 for key in drawn}) + Counter(key[1:] for key in drawn.elements()) == sent


@pytest.mark.parametrize("name", DIAGRAMS)
def test_all_sums_are_complete_in_the_end(name: str) -> None:
    for size in (2, 4, 8) if name == "two-level" else SIZES:
        length = DIAGRAMS[name].elements(size)
        steps = list(rounds(DIAGRAMS[name].columns, size, length))
        *before, last = progress(steps, size, length)
        assert all(cell == frozenset(range(size)) for row in last for cell in row)
        assert any(len(cell) < size for row in before[-1] for cell in row)


def test_two_levels_send_between_nodes_what_one_rank_would() -> None:
    between = [found for found in ARROW.findall(draw("two-level", 4)) if int(found[1]) // 2 != int(found[2]) // 2]
    # Two nodes of two ranks, n = 4 elements: 2(N-1)/N n = 4 leave each node, one at a time.
    assert len(between) == 8


@pytest.mark.parametrize("name", DIAGRAMS)
def test_nothing_is_drawn_outside_the_sheet(name: str) -> None:
    image = draw(name, 4)
    width, height = (float(each) for each in re.findall(r'viewBox="0 0 (\S+) (\S+)"', image)[0])
    for axis, limit in (("x", width), ("y", height)):
        places = [float(place) for place in re.findall(rf' {axis}[12]?="([-\d.]+)"', image)]
        assert all(0 <= place < limit for place in places)
    assert "\n\n" not in image  # Markdown would end the image there
