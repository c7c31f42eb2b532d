"""Closed forms of the cost against what the checker counts when it executes the schedules.

Costs are whole numbers of seconds and buffers are cut without a remainder, so results are compared exactly.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest

from allreduce_sgd.schedules import cost
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.check import check_columns, execute
from allreduce_sgd.schedules.cost import LinkCost

SIZES = range(1, 34)
PARTS = {"alpha": LinkCost(1.0, 0.0, 0.0), "beta": LinkCost(0.0, 1.0, 0.0), "gamma": LinkCost(0.0, 0.0, 1.0)}
WHOLE = LinkCost(700.0, 3.0, 2.0)
ITEM_BYTES = 4


def case(name: str, size: int) -> tuple[int, int | None]:
    """A length that chunks of P and of the core's 2^k ranks divide, and a segment of a quarter of what is cut."""
    core = 1 << (size.bit_length() - 1)
    length = 4 * size * core
    return length, {"segmented-ring": core, "chain": length // 4}.get(name)


def counted(name: str, size: int, link: LinkCost) -> float:
    """Return the critical path: when the last rank ends."""
    length, segment = case(name, size)
    return max(execute(ALL_REDUCE[name].schedule(segment), [np.zeros(length, np.float32)] * size, link).seconds)


def priced(name: str, size: int, link: LinkCost) -> float:
    length, segment = case(name, size)
    segment_bytes = None if segment is None else segment * ITEM_BYTES
    return ALL_REDUCE[name].seconds(size, length * ITEM_BYTES, link, segment_bytes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(ALL_REDUCE))
def test_closed_forms_are_the_critical_path_that_the_checker_counts(name: str, size: int) -> None:
    for part in PARTS.values():
        assert priced(name, size, part) == counted(name, size, part)
    if name == "segmented-ring":
        # The form is that of an executor that looks ahead; the checker takes one step after the other.
        assert size == 1 or priced(name, size, WHOLE) < counted(name, size, WHOLE)
    else:
        assert priced(name, size, WHOLE) == counted(name, size, WHOLE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(ALL_REDUCE))
def test_alpha_counts_rounds_and_beta_what_the_busiest_rank_sends(name: str, size: int) -> None:
    algorithm = ALL_REDUCE[name]
    length, segment = case(name, size)
    ranks = range(size)
    steps = max(algorithm.step_count(rank, size, length, segment) for rank in ranks)
    sent_bytes = ITEM_BYTES * max(algorithm.elements_sent(rank, size, length) for rank in ranks)
    alpha, beta = priced(name, size, PARTS["alpha"]), priced(name, size, PARTS["beta"])
    assert alpha == check_columns(algorithm.columns(segment), algorithm.schedule(segment), size, length)
    if name != "chain":
        # A rank of the chain is idle until the first segment reaches it.
        assert alpha == steps
    folds = size & (size - 1) and name.endswith("doubling")
    if folds:
        # The rank that takes another one in receives a whole buffer before it first sends.
        assert beta == sent_bytes + length * ITEM_BYTES
    elif name in ("ring", "segmented-ring", "recursive-doubling", "halving-doubling"):
        assert beta == sent_bytes


@pytest.mark.parametrize("segments", [2, 3, 4, 9])
@pytest.mark.parametrize("link", [WHOLE, LinkCost(0.0, 1.0, 1.0), LinkCost(1.0, 1.0, 40.0), LinkCost(500.0, 1.0, 9.0)])
def test_segmented_ring_is_what_an_executor_takes_that_sends_and_reduces_at_once(link: LinkCost, segments: int) -> None:
    segment_bytes = 64
    message = link.alpha_seconds + segment_bytes * link.beta_seconds_per_byte
    reduction = segment_bytes * link.gamma_seconds_per_byte
    for size in range(2, 34):
        count = (size - 1) * segments
        # All ranks do the same at the same time: follow one of them.
        sent = reduced = 0.0
        ready = [0.0] * segments
        for number in range(2 * count):
            sent = max(sent, ready[number]) + message
            if number < count:
                reduced = max(reduced, sent) + reduction
            ready.append(reduced if number < count else sent)
        n_bytes = size * segments * segment_bytes
        assert cost.segmented_ring(size, n_bytes, link, segment_bytes) == sent


def test_a_segmented_ring_in_one_segment_costs_what_the_ring_costs() -> None:
    for size in SIZES:
        for segment_bytes in (None, 4096):
            assert cost.segmented_ring(size, 4096 * size, WHOLE, segment_bytes) == cost.ring(size, 4096 * size, WHOLE)


@pytest.mark.parametrize("name", ["chain", "segmented-ring"])
@pytest.mark.parametrize("link", [LinkCost(5e-5, 8e-9, 1e-10), LinkCost(1e-6, 1e-10, 3e-10), LinkCost(1e-6, 0.0, 0.0)])
@pytest.mark.parametrize("n_bytes", [4, 64 * 1024, 8 * 1024**2])
def test_no_segment_size_is_better_than_the_best(name: str, link: LinkCost, n_bytes: int) -> None:
    algorithm = ALL_REDUCE[name]
    for size in (1, 2, 3, 8, 33):
        best = algorithm.best_segment_bytes(size, n_bytes, link)
        assert best is None or best % 64 == 0
        tried = [None, *(64 * 2**k for k in range(20)), *(192 * 2**k for k in range(20))]
        least = min(algorithm.seconds(size, n_bytes, link, each) for each in tried)
        assert algorithm.seconds(size, n_bytes, link, best) <= 1.01 * least


def test_the_best_chain_has_the_number_of_segments_of_the_closed_form() -> None:
    size, n_bytes, link = 10, 2.0**25, LinkCost(2e-5, 1e-9, 2e-10)
    best = cost.chain_segment_bytes(size, n_bytes, link)
    assert best is not None
    assert n_bytes / best == pytest.approx(math.sqrt((size - 2) * n_bytes * 2.2e-9 / 4e-5), rel=0.01)


def test_free_messages_have_segments_of_a_cache_line() -> None:
    assert cost.chain_segment_bytes(10, 2.0**20, LinkCost(0.0, 1e-9, 0.0)) == 64


@pytest.mark.parametrize("cut", [cost.chain, cost.segmented_ring])
def test_a_segment_without_bytes_is_refused(cut: Callable[[int, float, LinkCost, int], float]) -> None:
    with pytest.raises(ValueError, match="segment_bytes is 0"):
        cut(4, 1000, WHOLE, 0)


@pytest.mark.parametrize("local_size", [1, 2, 4, 8])
@pytest.mark.parametrize("nodes", [1, 2, 3, 16])
def test_two_levels_cost_a_ring_inside_and_a_share_of_the_card_between(local_size: int, nodes: int) -> None:
    inside, between = LinkCost(1e-6, 1e-10, 2e-10), LinkCost(3e-5, 8e-9, 2e-10)
    q, p, n = local_size, local_size * nodes, 1e7
    expected = (
        2 * (q - 1) * 1e-6
        + 2 * (q - 1) / q * n * 1e-10
        + 2 * (nodes - 1) * 3e-5
        + 2 * (nodes - 1) / nodes * (n / q) * (q * 8e-9)
        + (p - 1) / p * n * 2e-10
    )
    assert cost.two_level(q, nodes, n, inside, between) == pytest.approx(expected, rel=1e-12)


def test_two_levels_take_another_algorithm_between_nodes() -> None:
    inside, between = LinkCost(1e-6, 1e-10, 2e-10), LinkCost(3e-5, 8e-9, 2e-10)
    expected = cost.ring(2, 1000, inside) + cost.recursive_doubling(4, 500, LinkCost(3e-5, 16e-9, 2e-10))
    assert cost.two_level(2, 4, 1000, inside, between, cost.recursive_doubling) == expected


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_link_refuses_costs_that_cannot_be(value: float) -> None:
    with pytest.raises(ValueError, match=f"beta_seconds_per_byte is {value}"):
        LinkCost(1e-6, value, 0.0)
