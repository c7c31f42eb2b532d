"""Several messages as one Work: one deadline, one answer."""

import time

import pytest
import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.messages import exchange_rows, has_messages
from allreduce_sgd.errors import CommunicationTimeout


class Message:
    """Ends so many seconds after it was made."""

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    def wait(self, timeout: float | None = None) -> Tensor:
        assert timeout is not None
        left = self.ends - time.monotonic()
        time.sleep(max(0.0, min(left, timeout)))
        if left > timeout:
            raise CommunicationTimeout("late")
        return torch.empty(0)

    def done(self) -> bool:
        return time.monotonic() >= self.ends


class Slow(SingleCommunicator):
    """Rank 1 of 3; what comes from rank 2 takes its time."""

    rank, size, backend = 1, 3, "mpi"

    def __init__(self, seconds: float) -> None:
        super().__init__(timeout_seconds=0.2)
        self.seconds = seconds
        self.moved: list[tuple[str, int, float]] = []

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> Work:
        self.moved.append(("to", to, float(buffer[0])))
        return Message(0.0)

    def receive(self, buffer: Tensor, source: int | None = None, tag: int = 0) -> Work:
        assert source is not None
        self.moved.append(("from", source, float(buffer[0])))
        return Message(self.seconds if source == 2 else 0.0)


ROWS = torch.arange(3.0).view(3, 1)


def test_every_row_goes_to_its_rank_and_the_own_one_nowhere() -> None:
    comm = Slow(0.05)
    work = exchange_rows(ROWS, 10 + ROWS, comm)
    assert sorted(comm.moved) == [("from", 0, 10.0), ("from", 2, 12.0), ("to", 0, 0.0), ("to", 2, 2.0)]
    assert not work.done()
    assert torch.equal(work.wait(), 10 + ROWS)
    assert work.done()


@pytest.mark.parametrize("timeout", [None, 0.1])
def test_one_deadline_for_all(timeout: float | None) -> None:
    started = time.monotonic()
    with pytest.raises(CommunicationTimeout):
        exchange_rows(ROWS, ROWS.clone(), Slow(30.0)).wait(timeout)
    assert time.monotonic() - started < 5


def test_one_rank_alone_has_nothing_to_wait_for() -> None:
    comm: Communicator = SingleCommunicator()
    assert not has_messages(comm)
    assert exchange_rows(ROWS[:1], ROWS[:1].clone(), comm).done()
