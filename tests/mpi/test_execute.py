"""Schedules over MPI give what the checker of schedules gives, bit for bit, however far the executor looks ahead."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.choice import default_choice
from allreduce_sgd.comm.execute import Execution, Scratch
from allreduce_sgd.comm.mpi import MpiCommunicator
from allreduce_sgd.comm.progress import ProgressEngine
from allreduce_sgd.errors import CommunicationError
from allreduce_sgd.schedules import ring
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.check import execute
from allreduce_sgd.schedules.step import NOTHING, Schedule, Step
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import TIMEOUT_SECONDS
from tests.schedules.inputs import wide_floats

CPU = torch.device("cpu")
LOOK_AHEADS = (1, 2, 6, 50)
LENGTH = 61


class Runner:
    """Runs schedules as the executor does, in the calling thread."""

    def __init__(self, comm: Any, lock: threading.Lock) -> None:
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.sent_bytes: list[int] = []
        self._lock: AbstractContextManager[bool] = lock
        self._scratch = Scratch(CPU)

    def run(self, schedule: Schedule, buffer: torch.Tensor, op: ReduceOp | None, look_ahead: int) -> torch.Tensor:
        flat = buffer.clone()
        self.sent_bytes.clear()
        steps = schedule(self.rank, self.size, len(flat))
        execution = Execution(flat, op, self.comm, self._scratch, self.sent_bytes.append)
        program = execution.run(steps, look_ahead)
        deadline_seconds = time.monotonic() + TIMEOUT_SECONDS
        while True:
            with self._lock:
                if next(program, None) is None:
                    return flat
            assert time.monotonic() < deadline_seconds
            time.sleep(0)


@pytest.fixture(scope="module")
def runner(topology: Topology) -> Iterator[Runner]:
    with topology.mpi_lock:
        comm = topology.world.Dup()
    yield Runner(comm, topology.mpi_lock)
    with topology.mpi_lock:
        comm.Free()


def same_bits(result: torch.Tensor, wanted: npt.NDArray[Any]) -> bool:
    return result.numpy().tobytes() == wanted.tobytes()


@pytest.mark.parametrize("segment", [1, 3, 7, 1000])
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_every_algorithm_at_every_look_ahead(runner: Runner, name: str, segment: int) -> None:
    schedule = ALL_REDUCE[name].schedule(segment)
    for length in (1, runner.size, LENGTH):
        buffers = wide_floats(runner.size, length)
        wanted = execute(schedule, buffers)
        for look_ahead in LOOK_AHEADS:
            result = runner.run(schedule, torch.from_numpy(buffers[runner.rank]), ReduceOp.SUM, look_ahead)
            assert same_bits(result, wanted.buffers[runner.rank]), (length, look_ahead)
            assert sum(runner.sent_bytes) == 4 * wanted.elements_sent[runner.rank]


def random_schedule(seed: int, size: int, rounds: int) -> Schedule:
    """A schedule in which, round by round, random pairs pass pieces that overlap those of the rounds before at random.

    Every send meets its receive in its round, so that it cannot deadlock; ranks without either have no step.
    """
    generator = random.Random(f"{seed} {size}")
    steps: list[list[Step]] = [[] for _ in range(size)]

    def piece(length: int) -> slice:
        start = generator.randrange(LENGTH - length + 1)
        return slice(start, start + length)

    for _ in range(rounds):
        senders = generator.sample(range(size), generator.randint(1, size))
        receivers = generator.sample(range(size), len(senders))
        sends: dict[int, tuple[int, slice]] = {}
        receives: dict[int, tuple[int, slice]] = {}
        for sender, receiver in zip(senders, receivers, strict=True):
            if sender != receiver:
                length = generator.choice([0, 1, 5, 20])
                sends[sender] = receiver, piece(length)
                receives[receiver] = sender, piece(length)
        for rank in sends.keys() | receives.keys():
            send_to, send = sends.get(rank, (None, NOTHING))
            recv_from, recv = receives.get(rank, (None, NOTHING))
            overlap = max(send.start, recv.start) < min(send.stop, recv.stop)
            reduce = recv_from is not None and (overlap or generator.random() < 0.6)
            steps[rank].append(Step(send_to, send, recv_from, recv, reduce))
    return lambda rank, size, length: iter(steps[rank])


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_whose_steps_touch_the_same_elements(runner: Runner, seed: int) -> None:
    schedule = random_schedule(seed, runner.size, rounds=40)
    # Integers that wrap around: the result tells every order of writes and reads from every other, nearly.
    buffers = [np.random.default_rng(100 * seed + rank).integers(0, 2**62, LENGTH) for rank in range(runner.size)]
    wanted = execute(schedule, buffers)
    for look_ahead in LOOK_AHEADS:
        result = runner.run(schedule, torch.from_numpy(buffers[runner.rank]), ReduceOp.SUM, look_ahead)
        assert same_bits(result, wanted.buffers[runner.rank]), look_ahead
        assert sum(runner.sent_bytes) == 8 * wanted.elements_sent[runner.rank]


def test_more_messages_between_two_ranks_than_there_are_tags(runner: Runner) -> None:
    if runner.size != 2:
        pytest.skip("two ranks are enough, and the quickest")
    count = 33_000

    def one_by_one(rank: int, size: int, length: int) -> Iterator[Step]:
        for index in range(count):
            element = slice(index % length, index % length + 1)
            if rank == 0:
                yield Step(1, element, None, NOTHING, reduce=False)
            else:
                yield Step(None, NOTHING, 0, element, reduce=True)

    buffer = torch.full((10,), runner.rank, dtype=torch.int64) + 1
    result = runner.run(one_by_one, buffer, ReduceOp.SUM, 6)
    assert torch.equal(result, torch.full((10,), 2 + count // 10) if runner.rank == 1 else buffer)


def circle(rank: int, size: int, length: int) -> Iterator[Step]:
    """The first half of everyone's buffer becomes the second half of the next rank's."""
    if size > 1:
        half = length // 2
        yield Step((rank + 1) % size, slice(0, half), (rank - 1) % size, slice(half, 2 * half), reduce=False)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_schedule_of_ones_own(comm: MpiCommunicator, blocking: bool) -> None:
    buffer = torch.full((2, 6), comm.rank, dtype=torch.bfloat16)
    assert comm.run(buffer, circle, blocking=blocking).wait().data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[0], torch.full((6,), comm.rank, dtype=torch.bfloat16))
    assert torch.equal(buffer[1], torch.full((6,), (comm.rank - 1) % comm.size, dtype=torch.bfloat16))

    buffers = wide_floats(comm.size, LENGTH)
    mine = torch.from_numpy(buffers[comm.rank].copy())
    comm.run(mine, ring.reduce_scatter, ReduceOp.SUM, blocking=blocking).wait()
    comm.run(mine, ring.all_gather, blocking=blocking).wait()
    assert same_bits(mine, execute(ring.ring, buffers).buffers[0])

    if comm.size > 1:
        for seed in range(3):
            schedule = random_schedule(seed, comm.size, rounds=10)
            whole = [np.arange(LENGTH) * (rank + 1) for rank in range(comm.size)]
            own = torch.from_numpy(whole[comm.rank].copy())
            comm.run(own, schedule, ReduceOp.SUM, blocking=blocking).wait()
            assert same_bits(own, execute(schedule, whole).buffers[comm.rank])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_average_by_a_schedule_of_ones_own(comm: MpiCommunicator, dtype: torch.dtype) -> None:
    # The sum of float16 would overflow; what is added up is float32.
    buffer = torch.full((LENGTH,), 60_000.0, dtype=dtype)
    kept = buffer.clone()
    comm.run(buffer, ALL_REDUCE["chain"].schedule(4), ReduceOp.AVERAGE).wait()
    assert torch.equal(buffer, kept)


def test_a_schedule_that_fails_says_so(topology: Topology, runner: Runner) -> None:
    if runner.size == 1:
        pytest.skip("needs a second rank")

    def broken(rank: int, size: int, length: int) -> Iterator[Step]:
        yield from circle(rank, size, length)
        raise LookupError("no more steps")

    made = MpiCommunicator(
        topology.world,
        ProgressEngine(topology.mpi_lock),
        lambda layout: default_choice(layout.nodes, layout.memory is not None, deterministic=False),
        TIMEOUT_SECONDS,
    )
    with pytest.raises(CommunicationError, match=r"schedule of 8 float32 .* failed: LookupError\('no more steps'\)"):
        made.run(torch.ones(8), broken).wait()
    # A communicator on which something failed cannot be closed in order; nothing else uses this one.
