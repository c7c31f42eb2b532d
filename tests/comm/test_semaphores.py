"""Barriers of processes on semaphores in memory that they share, without MPI."""

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from allreduce_sgd.comm.semaphores import SEMAPHORE_BYTES, NodeBarrier, Semaphore, barrier_bytes, create_semaphores
from tests.launching import ROOT, environment_with

GROUPS = (1, 2, 3, 5)
ROUNDS = 300
AREA_BYTES = 4096

# Rank r of 5 takes part in the barriers of all groups of more than r ranks. In each round it writes the round's number,
# passes, and looks at what the others wrote: at least as much, and at most one more, for who is ahead already.
RANK = f"""
import ctypes, mmap, sys, time
import torch
from allreduce_sgd.comm.semaphores import NodeBarrier, barrier_bytes
descriptor, rank = map(int, sys.argv[1:])
memory = torch.frombuffer(mmap.mmap(descriptor, {AREA_BYTES * len(GROUPS)}), dtype=torch.uint8)
began, cpu_seconds = time.monotonic(), time.process_time()
for index, ranks in enumerate({GROUPS}):
    if rank >= ranks:
        continue
    base = {AREA_BYTES} * index
    barrier = NodeBarrier(memory[base:], rank, ranks, spin=False)
    seen = (ctypes.c_int64 * ranks).from_address(memory.data_ptr() + base + barrier_bytes(ranks))
    for number in range(1, {ROUNDS} + 1):
        if number % 97 == rank:
            time.sleep(0.01)
        seen[rank] = number
        for semaphore in barrier.pass_through():
            assert time.monotonic() - began < 30, (ranks, number, list(seen))
            semaphore.sleep(1.0)
        assert all(number <= other <= number + 1 for other in seen), (ranks, number, list(seen))
print("passed", time.process_time() - cpu_seconds)
"""


@pytest.fixture
def memory() -> Tensor:
    """Zeroed bytes."""
    return torch.zeros(AREA_BYTES, dtype=torch.uint8)


@pytest.fixture
def semaphore(memory: Tensor) -> Semaphore:
    create_semaphores(memory, 1)
    return Semaphore(memory, 0)


def test_processes_meet_in_every_round() -> None:
    descriptor = os.memfd_create("barrier")
    try:
        os.ftruncate(descriptor, AREA_BYTES * len(GROUPS))
        area = torch.frombuffer(mmap.mmap(descriptor, AREA_BYTES * len(GROUPS)), dtype=torch.uint8)
        for index, ranks in enumerate(GROUPS):
            assert barrier_bytes(ranks) + 8 * ranks <= AREA_BYTES
            create_semaphores(area[index * AREA_BYTES :], ranks)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(descriptor), str(rank)],
                pass_fds=[descriptor],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment_with({}),
            )
            for rank in range(max(GROUPS))
        ]
        for process in processes:
            output, errors = process.communicate(timeout=60)
            assert output.startswith("passed"), errors
    finally:
        os.close(descriptor)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_nobody_passes_before_all_have_come_in_whatever_order_they_run(data: st.DataObject) -> None:
    ranks, barriers = data.draw(st.integers(1, 9)), 4
    area = torch.zeros(AREA_BYTES, dtype=torch.uint8)
    create_semaphores(area, ranks)
    come, passed = [0] * ranks, [0] * ranks

    def run(rank: int) -> Iterator[Semaphore]:
        barrier = NodeBarrier(area, rank, ranks, spin=data.draw(st.booleans()))
        for number in range(1, barriers + 1):
            come[rank] = number
            yield from barrier.pass_through()
            # Those who have not run since may still be before their way out, but all have come.
            assert min(come) >= number
            passed[rank] = number

    going = dict(enumerate(map(run, range(ranks))))
    fair: list[int] = []
    while going:
        # Any rank may run, often the same one again; every one gets a turn at last.
        fair = fair or list(going)
        rank = data.draw(st.sampled_from(sorted(going))) if data.draw(st.booleans()) else fair.pop()
        if rank in going and next(going[rank], None) is None:
            del going[rank]
    assert passed == [barriers] * ranks


def test_a_rank_ahead_by_one_barrier_does_no_harm(memory: Tensor) -> None:
    create_semaphores(memory, 2)
    slow, quick = (NodeBarrier(memory, rank, 2, spin=False) for rank in range(2))
    first_of_slow = slow.pass_through()
    next(first_of_slow)
    # The quick rank passes and comes to the second barrier; both of its posts lie there for the slow one.
    assert list(quick.pass_through()) == []
    second_of_quick = quick.pass_through()
    waits_for = next(second_of_quick)
    assert next(first_of_slow, None) is None
    assert next(second_of_quick) is waits_for, "the slow rank has not come to the second barrier yet"
    assert list(slow.pass_through()) == []
    assert next(second_of_quick, None) is None


def test_one_rank_passes_at_once(memory: Tensor) -> None:
    create_semaphores(memory, 1)
    barrier = NodeBarrier(memory, 0, 1, spin=True)
    assert [list(barrier.pass_through()) for _ in range(3)] == [[], [], []]


def test_the_memory_of_a_barrier() -> None:
    assert [barrier_bytes(ranks) // SEMAPHORE_BYTES for ranks in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 6, 8, 15, 24, 36]


def test_posts_are_counted_and_taken_one_by_one(semaphore: Semaphore) -> None:
    assert not semaphore.take()
    for _ in range(3):
        semaphore.post()
    assert [semaphore.take() for _ in range(4)] == [True, True, True, False]


def test_sleep_keeps_posts_for_take(semaphore: Semaphore) -> None:
    semaphore.post()
    semaphore.post()
    started = time.monotonic()
    for _ in range(2):
        semaphore.sleep(20.0)
    assert time.monotonic() - started < 5
    assert [semaphore.take() for _ in range(3)] == [True, True, False]


def test_sleep_wakes_soon_after_a_post_and_burns_nothing(semaphore: Semaphore) -> None:
    threading.Timer(0.1, semaphore.post).start()
    started, cpu_seconds = time.monotonic(), time.process_time()
    semaphore.sleep(20.0)
    slept, burnt = time.monotonic() - started, time.process_time() - cpu_seconds
    assert 0.09 < slept < 1.1
    assert burnt < 0.05
    assert semaphore.take()


def test_sleep_lets_other_threads_run(semaphore: Semaphore) -> None:
    counted = 0
    sleeper = threading.Thread(target=semaphore.sleep, args=[20.0])
    sleeper.start()
    while counted < 1000 and sleeper.is_alive():
        counted += 1
    semaphore.post()
    sleeper.join(5)
    assert not sleeper.is_alive()
    assert counted == 1000


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
def test_sleep_ends_when_no_post_comes(semaphore: Semaphore, seconds: float) -> None:
    started, cpu_seconds = time.monotonic(), time.process_time()
    semaphore.sleep(seconds)
    assert 0.9 * seconds <= time.monotonic() - started < seconds + 1
    assert time.process_time() - cpu_seconds < 0.05
    assert not semaphore.take()


def test_two_threads_that_sleep_on_one_post_both_wake(semaphore: Semaphore) -> None:
    # The progress thread may still sleep when a caller comes to wait for the same peer: whichever of the two gets
    # the post, the caller must not sleep on.
    ended: list[float] = []

    def sleep() -> None:
        semaphore.sleep(3.0)
        ended.append(time.monotonic())

    threads = [threading.Thread(target=sleep) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    posted = time.monotonic()
    semaphore.post()
    for thread in threads:
        thread.join(10)
    assert max(ended) - posted < 1
    assert [semaphore.take(), semaphore.take()] == [True, False]
