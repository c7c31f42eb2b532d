"""Proof by execution: run all ranks' steps of a schedule in one process, without any network.

Sends are treated as synchronous (a send ends only when its receiver has posted the matching receive), the strictest
behaviour MPI allows, so a schedule that passes here cannot deadlock for want of buffering.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.step import NOTHING, Column, Columnar, Schedule, Step

__all__ = ["Execution", "ScheduleError", "check_columns", "execute"]

Buffer = npt.NDArray[Any]

FREE = LinkCost(0.0, 0.0, 0.0)


class ScheduleError(AssertionError):
    """A schedule is wrong; the text names the ranks, the step and what does not fit."""


@dataclass
class Execution:
    """What an executed schedule did: final buffers, and per rank the steps taken, elements sent and seconds at its end.

    Seconds count from a common start: a message begins when both of its ranks have come to the step, takes
    alpha + beta·bytes, and is combined, gamma·bytes, once both halves of the receiver's step have ended.
    """

    buffers: list[Buffer]
    steps: list[int]
    elements_sent: list[int]
    seconds: list[float]


def execute(schedule: Schedule, buffers: Sequence[Buffer], link: LinkCost = FREE) -> Execution:
    """Execute `schedule` on copies of one buffer of shape (length,) per rank, all of one dtype, reducing by addition.

    Raises ScheduleError where a step leaves its buffer, overwrites what it sends, meets a message of another length,
    or where ranks wait for each other for ever.
    """
    ranks = [_Rank(rank, schedule, buffer.copy(), len(buffers)) for rank, buffer in enumerate(buffers)]
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            if rank.receives and _deliver(ranks[rank.step.recv_from or 0], rank, link):
                moved = True
        for rank in ranks:
            if rank.running and not rank.receives and not rank.sends:
                rank.finish_step(link)
                moved = True
    stuck = {rank.rank: rank.step for rank in ranks if rank.running}
    if stuck:
        raise ScheduleError(f"deadlock with {len(buffers)} ranks and length {len(buffers[0])}: {stuck}")
    return Execution(
        [rank.buffer for rank in ranks],
        [rank.steps for rank in ranks],
        [rank.elements_sent for rank in ranks],
        [rank.seconds for rank in ranks],
    )


class _Rank:
    """One rank of an execution: its buffer, and the step it is in with the halves that are still to be done."""

    def __init__(self, rank: int, schedule: Schedule, buffer: Buffer, size: int) -> None:
        self.rank, self.size, self.buffer = rank, size, buffer
        self.program = schedule(rank, size, len(buffer))
        self.steps = self.elements_sent = 0
        self.seconds = self.halves_end = 0.0
        self.message: Buffer | None = None
        self._next_step()

    def _next_step(self) -> None:
        step = next(self.program, None)
        self.running = step is not None
        self.step = step or Step(None, NOTHING, None, NOTHING, reduce=False)
        _check_step(self.step, self.rank, self.size, len(self.buffer))
        self.sends = self.step.send.start != self.step.send.stop
        self.receives = self.step.recv.start != self.step.recv.stop

    def finish_step(self, link: LinkCost) -> None:
        """Combine what came, now that the own send has ended, and go on to the next step."""
        self.seconds = max(self.seconds, self.halves_end)
        if self.message is not None:
            if self.step.reduce:
                self.buffer[self.step.recv] += self.message
                self.seconds += link.gamma_seconds_per_byte * self.message.nbytes
            else:
                self.buffer[self.step.recv] = self.message
        self.message = None
        self.steps += 1
        self._next_step()


def _check_step(step: Step, rank: int, size: int, length: int) -> None:
    for peer, piece in ((step.send_to, step.send), (step.recv_from, step.recv)):
        if peer is None and piece.start != piece.stop:
            raise ScheduleError(f"rank {rank}: {step} moves elements but has no peer")
        if peer is not None and (peer == rank or not 0 <= peer < size):
            raise ScheduleError(f"rank {rank}: {step} names a peer that is itself or outside 0..{size - 1}")
        if not 0 <= piece.start <= piece.stop <= length:
            raise ScheduleError(f"rank {rank}: {step} leaves the buffer of {length} elements")
    if not step.reduce and max(step.send.start, step.recv.start) < min(step.send.stop, step.recv.stop):
        raise ScheduleError(f"rank {rank}: {step} overwrites what it sends")


def _deliver(sender: _Rank, receiver: _Rank, link: LinkCost) -> bool:
    """Move the message `receiver` waits for, if its sender is at the matching step; say whether it moved."""
    if not sender.sends or sender.step.send_to != receiver.rank:
        return False
    message = sender.buffer[sender.step.send]
    if len(message) != receiver.step.recv.stop - receiver.step.recv.start:
        raise ScheduleError(
            f"rank {sender.rank} sends {sender.step}, but rank {receiver.rank} receives {receiver.step}"
        )
    end = max(sender.seconds, receiver.seconds) + link.message_seconds(message.nbytes)
    sender.halves_end, receiver.halves_end = max(sender.halves_end, end), max(receiver.halves_end, end)
    sender.elements_sent += len(message)
    sender.sends = receiver.receives = False
    receiver.message = message.copy()
    return True


def check_columns(columns: Columnar, schedule: Schedule, size: int, length: int) -> int:
    """Hold the columnar form of a schedule against its generator, for every rank; return the number of rounds.

    Raises ScheduleError where a rank's row has other steps, or where a send has no matching receive in its round.
    """
    programs = [schedule(rank, size, length) for rank in range(size)]
    rounds = 0
    for rounds, column in enumerate(columns(size, length), start=1):
        _check_round(column, rounds, size)
        for rank in range(size):
            step = _row(column, rank)
            expected = next(programs[rank], None) if step is not None else None
            if step != expected:
                raise ScheduleError(f"round {rounds} of {size} ranks: rank {rank} has {step}, its schedule {expected}")
    rest = [rank for rank, program in enumerate(programs) if next(program, None) is not None]
    if rest:
        raise ScheduleError(f"after {rounds} rounds of {size} ranks: ranks {rest} have steps left")
    return rounds


def _check_round(column: Column, number: int, size: int) -> None:
    for name, array in column._asdict().items():
        if array.shape != (size,):
            raise ScheduleError(f"round {number}: {name} has shape {array.shape}, not {(size,)}")
    senders = np.flatnonzero(column.sends)
    receivers = column.send_to[senders]
    met = np.zeros(size, bool)
    met[receivers] = True
    if not (
        len(np.unique(receivers)) == len(senders)
        and np.array_equal(met, column.receives)
        and np.array_equal(column.recv_from[receivers], senders)
        and np.array_equal(
            (column.send_stop - column.send_start)[senders], (column.recv_stop - column.recv_start)[receivers]
        )
    ):
        raise ScheduleError(f"round {number} of {size} ranks: a send and its receive do not match: {column}")


def _row(column: Column, rank: int) -> Step | None:
    sends, send_to, send_start, send_stop, receives, recv_from, recv_start, recv_stop, reduce = (
        array[rank].item() for array in column
    )
    if not sends and not receives:
        return None
    return Step(
        send_to if sends else None,
        slice(send_start, send_stop) if sends else NOTHING,
        recv_from if receives else None,
        slice(recv_start, recv_stop) if receives else NOTHING,
        reduce,
    )
