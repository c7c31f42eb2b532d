"""Numbers under a lock, on one rank; between ranks: tests/mpi/test_hogwild.py."""

import threading
import time

import pytest

from allreduce_sgd.comm.shared_numbers import SharedNumbers
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.errors import CommunicationTimeout


def test_numbers_begin_at_zero_and_keep_what_is_written() -> None:
    shared = SharedNumbers(SingleCommunicator(), 3)
    with shared as numbers:
        assert numbers.tolist() == [0.0, 0.0, 0.0]
        numbers[1] = 2.0**53
    with shared as numbers:
        assert numbers.tolist() == [0.0, 2.0**53, 0.0]


def test_a_lock_that_is_never_given_back_ends_at_the_deadline() -> None:
    comm = SingleCommunicator(timeout_seconds=0.3)
    shared = SharedNumbers(comm, 1)
    shared.__enter__()
    started, cpu_seconds = time.monotonic(), time.process_time()
    with pytest.raises(CommunicationTimeout, match=r"lock .* not free after 0.3 s; the rank that holds it is stuck"):
        shared.__enter__()
    assert 0.25 < time.monotonic() - started < 3
    assert time.process_time() - cpu_seconds < 0.1
    assert comm.traffic.waited_seconds > 0.25


def test_whoever_waits_gets_the_lock_when_it_is_given_back_and_after_an_error_too() -> None:
    shared = SharedNumbers(SingleCommunicator(timeout_seconds=20), 1)
    shared.__enter__()
    threading.Timer(0.1, shared.__exit__, [None, None, None]).start()
    started = time.monotonic()
    with pytest.raises(IndexError), shared as numbers:
        numbers[1] = 1.0
    assert 0.05 < time.monotonic() - started < 5
    with shared as numbers:
        assert numbers[0] == 0.0
