"""The simulator, against closed forms and against the checker, which follows the generators step by step.

Prices are whole numbers of seconds, so that float64 adds without rounding and results are compared exactly.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from allreduce_sgd.schedules import cost, segmented_ring
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.check import ScheduleError, execute
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize, Network, Placement, multi_lane, simulate
from allreduce_sgd.schedules.step import NOTHING, Column, Columnar, Schedule, Step, chunk

LINK = LinkCost(7.0, 3.0, 2.0)
SLOW = LinkCost(70.0, 30.0, 2.0)
FLAT = Network(LINK)


def ring_columns(size: int, length: int) -> Iterator[Column]:
    """The ring, written down a second time."""
    ranks, everyone = np.arange(size), np.ones(size, dtype=np.bool_)
    starts, stops = np.array([(each.start, each.stop) for each in (chunk(length, size, int(i)) for i in ranks)]).T
    for s in range(2 * (size - 1)):
        sent = (ranks - s - 1 if s < size - 1 else ranks - s + size - 1) % size
        received = (sent - 1) % size
        to, source = (ranks + 1) % size, (ranks - 1) % size
        reduce = np.full(size, s < size - 1)
        yield Column(
            everyone, to, starts[sent], stops[sent], everyone, source, starts[received], stops[received], reduce
        )


def schedule_of(columns: Columnar) -> Schedule:
    """Turn columns back into the steps of one rank, leaving out the idle rounds."""

    def steps(rank: int, size: int, length: int) -> Iterator[Step]:
        for column in columns(size, length):
            own = [int(field[rank]) for field in column]
            send_to, send = (own[1], slice(own[2], own[3])) if own[0] else (None, NOTHING)
            recv_from, recv = (own[5], slice(own[6], own[7])) if own[4] else (None, NOTHING)
            if own[0] or own[4]:
                yield Step(send_to, send, recv_from, recv, bool(own[8]))

    return steps


def closed_form(name: str, size: int, length: int, segment: int | None) -> float:
    """The catalogue's seconds for 4-byte elements; with whole numbers they come out within rounding."""
    return ALL_REDUCE[name].seconds(size, 4 * length, LINK, None if segment is None else 4 * segment)


def ring_seconds(size: int, n_bytes: int, transfer: LinkCost = LINK) -> float:
    piece_bytes = n_bytes // size
    each = transfer.alpha_seconds + piece_bytes * transfer.beta_seconds_per_byte
    return 2 * (size - 1) * each + (size - 1) * piece_bytes * transfer.gamma_seconds_per_byte


@pytest.mark.parametrize("size", [*range(1, 34), 1024])
def test_the_ring_takes_what_its_closed_form_says(size: int) -> None:
    for per_rank in (1, 5, 64):
        result = simulate(ring_columns, size, per_rank * size, 4, FLAT)
        assert result.per_rank_seconds.tolist() == [ring_seconds(size, 4 * per_rank * size)] * size
        assert result.bytes_sent.tolist() == [8 * per_rank * (size - 1)] * size
        assert result.rounds == 2 * (size - 1)


@pytest.mark.parametrize("name", ALL_REDUCE)
@pytest.mark.parametrize("size", range(1, 34))
def test_columns_take_as_long_as_the_steps_of_the_generators(name: str, size: int) -> None:
    """The lengths give chunks that differ, are empty, or are cut into segments of which the last is shorter."""
    for length, segment in ((0, 2), (1, None), (size - 1, 3), (size + 1, None), (3 * size + 2, 2), (64, 5)):
        buffers = [np.zeros(length, dtype=np.int32)] * size
        executed = execute(ALL_REDUCE[name].schedule(segment), buffers, LINK)
        simulated = simulate(ALL_REDUCE[name].columns(segment), size, length, 4, FLAT)
        assert simulated.per_rank_seconds.tolist() == executed.seconds
        assert simulated.bytes_sent.tolist() == [4 * elements for elements in executed.elements_sent]


@pytest.mark.parametrize("name", ALL_REDUCE)
@pytest.mark.parametrize("size", [2, 3, 4, 8, 13, 32, 1024])
def test_algorithms_take_what_their_closed_forms_say(name: str, size: int) -> None:
    # Lengths that P and the power of two below it divide, so that chunks are equal whichever an algorithm cuts.
    for length in (32 * size, 160 * size):
        cuts: list[tuple[int | None, int]] = [(None, 0), (length // 4, 0)]
        if name == "segmented-ring":
            # Its closed form is that of an executor which looks ahead by all segments of a chunk.
            cuts = [(None, 0), (length // size // 4, 3)]
        for segment, look_ahead in cuts:
            result = simulate(ALL_REDUCE[name].columns(segment), size, length, 4, FLAT, look_ahead)
            assert result.seconds == pytest.approx(closed_form(name, size, length, segment), rel=1e-12)


@pytest.mark.parametrize("name", ["ring", "recursive-doubling", "halving-doubling", "tree", "chain"])
def test_closed_forms_hold_for_thousands_of_ranks(name: str) -> None:
    size = 4096
    result = simulate(ALL_REDUCE[name].columns(None), size, 2 * size, 4, FLAT)
    assert result.seconds == pytest.approx(closed_form(name, size, 2 * size, None), rel=1e-12)


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (3, 4), (4, 3)])
def test_the_slow_links_set_the_pace_of_a_contiguous_ring(nodes: int, per_node: int) -> None:
    size = nodes * per_node
    network = Network(LINK, SLOW, per_node)
    assert simulate(ring_columns, size, 6 * size, 4, network).seconds == ring_seconds(size, 24 * size, SLOW)


@pytest.mark.parametrize(("nics_per_node", "sharing"), [(1, 4), (2, 2), (4, 1), (9, 1)])
def test_messages_that_share_a_nic_share_its_bandwidth(nics_per_node: int, sharing: int) -> None:
    """Dealt in turn to three nodes of four, every neighbour is elsewhere, and all four ranks send at once."""
    network = Network(LINK, SLOW, 4, nics_per_node, placement="round_robin")
    shared = LinkCost(SLOW.alpha_seconds, sharing * SLOW.beta_seconds_per_byte, SLOW.gamma_seconds_per_byte)
    assert simulate(ring_columns, 12, 60, 4, network).seconds == ring_seconds(12, 240, shared)


@pytest.mark.parametrize("into_one_node", [True, False])
def test_the_busier_end_of_a_message_counts(into_one_node: bool) -> None:
    """Three messages from three nodes into one, or the other way round: the one NIC carries all three."""
    one, others = np.array([3, 4, 5]), np.array([0, 6, 9])

    def columns(size: int, length: int) -> Iterator[Column]:
        senders, receivers = (others, one) if into_one_node else (one, others)
        send_to, recv_from = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        sends, receives = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
        sends[senders], receives[receivers] = True, True
        send_to[senders], recv_from[receivers] = receivers, senders
        start, stop = np.zeros(size, dtype=np.int64), np.full(size, length)
        yield Column(sends, send_to, start, stop, receives, recv_from, start, stop, ~sends)

    result = simulate(columns, 12, 10, 1, Network(LINK, SLOW, ranks_per_node=3))
    assert result.seconds == 70 + 10 * 3 * 30 + 10 * 2
    assert np.count_nonzero(result.per_rank_seconds) == 6


@pytest.mark.parametrize("placement", ["contiguous", "round_robin"])
@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (4, 1), (2, 2), (3, 4), (4, 3)])
def test_lanes_compute_the_sum_wherever_ranks_stand(nodes: int, per_node: int, placement: Placement) -> None:
    size = nodes * per_node
    schedule = schedule_of(multi_lane(ring_columns, Network(LINK, SLOW, per_node, placement=placement)))
    for length in (0, 1, per_node + 1, 3 * size + 2):
        buffers = [np.random.default_rng(rank).integers(0, 1000, length) for rank in range(size)]
        total = np.sum(buffers, axis=0)
        assert all(np.array_equal(buffer, total) for buffer in execute(schedule, buffers).buffers)


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (4, 8), (16, 4)])
def test_two_levels_take_what_their_closed_form_says(nodes: int, per_node: int) -> None:
    size = nodes * per_node
    n_bytes = 4 * 6 * size
    network = Network(LINK, SLOW, per_node)
    result = simulate(multi_lane(ring_columns, network), size, 6 * size, 4, network)
    inside = 2 * (per_node - 1) * (LINK.alpha_seconds + n_bytes // per_node * LINK.beta_seconds_per_byte)
    each = SLOW.alpha_seconds + n_bytes // size * per_node * SLOW.beta_seconds_per_byte
    reduced_bytes = n_bytes - n_bytes // size
    assert result.seconds == inside + 2 * (nodes - 1) * each + reduced_bytes * LINK.gamma_seconds_per_byte
    assert result.seconds == pytest.approx(cost.two_level(per_node, nodes, n_bytes, LINK, SLOW), rel=1e-12)


def test_two_hosts_of_two_ranks_gain_what_their_shared_link_allows() -> None:
    """Where only the bytes between hosts cost: 1.5 against a contiguous ring, 3 against ranks dealt in turn."""
    free, wire = LinkCost(0.0, 0.0, 0.0), LinkCost(0.0, 1.0, 0.0)
    contiguous = Network(free, wire, 2)
    two_level = simulate(multi_lane(ring_columns, contiguous), 4, 400, 4, contiguous).seconds
    assert simulate(ring_columns, 4, 400, 4, contiguous).seconds == 1.5 * two_level
    assert simulate(ring_columns, 4, 400, 4, Network(free, wire, 2, placement="round_robin")).seconds == 3 * two_level


def test_a_cost_may_depend_on_the_size_of_the_message() -> None:
    link = LinkBySize((8, 100), (LinkCost(1.0, 0.0, 0.0), LinkCost(10.0, 0.0, 0.0), LinkCost(100.0, 0.0, 0.0)))
    alpha_seconds = [
        simulate(ring_columns, 2, 2 * n_bytes, 1, Network(link)).seconds / 2 for n_bytes in (8, 9, 100, 101)
    ]
    assert alpha_seconds == [1, 10, 10, 100]
    same = LinkBySize((16,), (LINK, LINK))
    assert simulate(ring_columns, 5, 23, 4, Network(same)).seconds == simulate(ring_columns, 5, 23, 4, FLAT).seconds
    with pytest.raises(ValueError, match="ascending limits"):
        LinkBySize((100, 8), (LINK, LINK, LINK))
    with pytest.raises(ValueError, match="1 costs"):
        LinkBySize((8,), (LINK,))


@pytest.mark.parametrize("gamma", [0, 1, 3, 9, 40])
@pytest.mark.parametrize(("size", "segments"), [(2, 2), (3, 2), (4, 5), (8, 3), (33, 4)])
def test_looking_ahead_hides_reductions_or_is_bound_by_them(size: int, segments: int, gamma: int) -> None:
    link = LinkCost(7.0, 3.0, float(gamma))
    segment = 5
    columns, length = segmented_ring.columns(segment), size * segments * segment
    ahead = simulate(columns, size, length, 4, Network(link), look_ahead=segments - 1)
    message, reduction, count = 7 + 20 * 3, 20 * gamma, (size - 1) * segments
    assert ahead.seconds == max(2 * count * message, count * reduction + (count - segments + 2) * message)
    strict = simulate(columns, size, length, 4, Network(link))
    assert strict.seconds == count * (2 * message + reduction)


@pytest.mark.parametrize(
    ("name", "twice"), [("ring", 2), ("halving-doubling", 2), ("recursive-doubling", 2), ("tree", 1)]
)
def test_a_core_that_sends_and_receives_needs_twice_as_long_for_a_byte(name: str, twice: int) -> None:
    columns = ALL_REDUCE[name].columns(None)
    own_core = simulate(columns, 8, 80, 4, Network(LINK, duplex=False))
    slower = LinkCost(LINK.alpha_seconds, twice * LINK.beta_seconds_per_byte, LINK.gamma_seconds_per_byte)
    assert own_core.per_rank_seconds.tolist() == simulate(columns, 8, 80, 4, Network(slower)).per_rank_seconds.tolist()


def test_cores_do_not_slow_messages_between_nodes() -> None:
    network = Network(LINK, SLOW, ranks_per_node=1, duplex=False)
    assert simulate(ring_columns, 5, 50, 4, network).seconds == ring_seconds(5, 200, SLOW)


def test_oversubscription_stays_apart_from_the_network() -> None:
    alone = simulate(ring_columns, 4, 40, 4, FLAT)
    crowded = simulate(ring_columns, 4, 40, 4, FLAT, oversubscription=2.5)
    assert crowded.seconds == alone.seconds
    assert crowded.oversubscribed_seconds == 2.5 * alone.seconds
    assert alone.oversubscribed_seconds is None


def test_a_message_that_nobody_receives_is_refused() -> None:
    def columns(size: int, length: int) -> Iterator[Column]:
        for column in ring_columns(size, length):
            yield column._replace(receives=np.arange(size) > 0)

    with pytest.raises(ScheduleError, match=r"ranks \[2\] send to ranks \[0\]"):
        simulate(columns, 3, 9, 4, FLAT)


def test_networks_and_lanes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Network(LINK, SLOW, ranks_per_node=0)
    network = Network(LINK, SLOW, ranks_per_node=4)
    with pytest.raises(ValueError, match="6 ranks do not fill nodes of 4"):
        simulate(multi_lane(ring_columns, network), 6, 12, 4, network)
