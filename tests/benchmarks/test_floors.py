"""The two floors and the clock, on ranks of their own: none of it needs a communicator of ours."""

from tests.warm_start import mpirun

MEMORY = """
import torch
from allreduce_sgd.topology import discover
from benchmarks.memory_floor import MemoryFloor
topology = discover()
for numel in (1, 2, 100_003):
    floor = MemoryFloor(topology, numel, torch.float32)
    floor.bucket.fill_(10.0 ** topology.rank)
    topology.gather_all(None)
    floor.add()
    topology.gather_all(None)
    expected = sum(10.0 ** rank for rank in range(topology.size))
    assert bool((floor.result == expected).all()), (numel, floor.result)
    assert bool((floor.bucket == 10.0 ** topology.rank).all())
print("right")
"""

# Ranks of one machine that take themselves for hosts.
TCP = """
import dataclasses, time, torch
from allreduce_sgd.topology import discover
from benchmarks.raw_tcp import LEAST_BYTES, RawTcp
topology = discover()
hosts = dataclasses.replace(topology, node=topology.rank, nodes=topology.size, local_rank=0, local_size=1)
tcp = RawTcp(hosts, 20.0)
assert tcp.prepare(1000) == LEAST_BYTES
for length in (LEAST_BYTES, LEAST_BYTES + 12345):
    assert tcp.prepare(length) == length
    nothing = torch.empty(0)
    assert tcp.exchange(nothing) is nothing
tcp.close()
print("right")
"""

STUCK = """
import time, torch
from allreduce_sgd.topology import discover
from benchmarks.collective_data import CollectiveData
from benchmarks.rounds import Contender, measure_rounds
topology = discover()
buffer = torch.zeros(4)
def call():
    topology.world.Recv(bytearray(1), source=1 - topology.rank)
    return buffer
data = CollectiveData("all_reduce", topology.rank, topology.size, 4, torch.float32)
measure_rounds(topology, [Contender("stuck", "", False, buffer, call, slice(0, 4))], data, 1, 1, 2.0, lambda: None)
"""

TURNS = """
import time, torch
from allreduce_sgd.topology import discover
from benchmarks.collective_data import CollectiveData
from benchmarks.rounds import Contender, measure_rounds, measure_wait
topology = discover()
data = CollectiveData("all_reduce", topology.rank, topology.size, 4, torch.float32)
order = []

def contender(name, seconds, burn, wrong):
    buffer = torch.zeros(4)
    def call():
        order.append(name)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            if not burn:
                time.sleep(seconds / 10)
        total = [sum(values) for values in zip(*topology.gather_all(buffer.tolist()))]
        buffer.copy_(torch.tensor(total))
        buffer[0] += wrong
        return buffer
    return Contender(name, "", False, buffer, call, slice(0, 4))

# Rank 1 takes longer, so its times count.
slow = 0.02 if topology.rank == 1 else 0.0
right, broken = contender("right", slow, True, 0), contender("broken", 0.0, True, 1)
first, second = measure_rounds(topology, [right, broken], data, 1, 3, 60.0, lambda: None)
assert len(first.seconds) == 3 and all(seconds >= 0.02 for seconds in first.seconds), first
assert first.wrong == 0 and second.wrong == 3 * topology.size, (first, second)
# Who begins changes from round to round.
changes = [name for name, before in zip(order, [None, *order]) if name != before]
assert changes == ["right", "broken", "right", "broken", "right"], changes
wait = measure_wait(topology, contender("sleeper", 0.0, False, 0), data, 3, 60.0)
assert 0.04 < wait.seconds and wait.cpu_seconds < 0.5 * wait.seconds, wait
print("right")
"""


def test_all_ranks_add_their_share_into_one_result() -> None:
    for ranks in (2, 3):
        run = mpirun(ranks, ["-c", MEMORY])
        assert run.status == 0, run.errors
        assert run.output.count("right") == ranks


def test_raw_tcp_moves_whole_messages_around_the_ring() -> None:
    for ranks in (2, 3):
        run = mpirun(ranks, ["-c", TCP], environment={"GLOO_SOCKET_IFNAME": "lo"})
        assert run.status == 0, run.errors
        assert run.output.count("right") == ranks


def test_a_call_that_never_returns_ends_the_job() -> None:
    run = mpirun(2, ["-c", STUCK], timeout_seconds=60)
    assert run.status != 0
    assert "Timeout (0:00:02)!" in run.errors


def test_the_slowest_rank_counts_and_wrong_elements_are_added_up() -> None:
    run = mpirun(2, ["-c", TURNS])
    assert run.status == 0, run.errors
    assert run.output.count("right") == 2
