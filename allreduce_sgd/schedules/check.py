"""Proof by execution: run all ranks' steps of a schedule in one process, without any network.

Sends are treated as synchronous (a send ends only when its receiver has posted the matching receive), the strictest
behaviour MPI allows, so a schedule that passes here cannot deadlock for want of buffering.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from allreduce_sgd.schedules.step import Schedule, Step

__all__ = ["Execution", "ScheduleError", "execute"]


class ScheduleError(AssertionError):
    """A schedule is wrong; the text names the ranks, the step and what does not fit."""


@dataclass
class Execution:
    """What an executed schedule did: final buffers, and per rank the steps taken and the elements sent."""

    buffers: list[npt.NDArray[np.int64]]
    steps: list[int]
    elements_sent: list[int]


def execute(schedule: Schedule, buffers: Sequence[npt.NDArray[np.int64]]) -> Execution:
    """Execute `schedule` on copies of one int64 buffer of shape (length,) per rank, reducing by addition.

    Raises ScheduleError where a step leaves its buffer, overlaps its own send and receive, meets a message of another
    length, or where ranks wait for each other for ever.
    """
    size, length = len(buffers), len(buffers[0])
    state = Execution([buffer.copy() for buffer in buffers], [0] * size, [0] * size)
    programs = [schedule(rank, size, length) for rank in range(size)]
    current = [next(program, None) for program in programs]
    pending = [_sides(step, rank, size, length) for rank, step in enumerate(current)]
    moved = True
    while moved:
        moved = False
        for receiver, step in enumerate(current):
            if step is None:
                continue
            if "recv" in pending[receiver] and _deliver(step, receiver, current, pending, state):
                moved = True
        for rank, step in enumerate(current):
            if step is not None and not pending[rank]:
                state.steps[rank] += 1
                current[rank] = next(programs[rank], None)
                pending[rank] = _sides(current[rank], rank, size, length)
                moved = True
    stuck = {rank: step for rank, step in enumerate(current) if step is not None}
    if stuck:
        raise ScheduleError(f"deadlock with {size} ranks and length {length}: {stuck}")
    return state


def _sides(step: Step | None, rank: int, size: int, length: int) -> set[str]:
    """Return which halves of a step are still to be done, after checking that the step itself makes sense."""
    if step is None:
        return set()
    for peer, piece in ((step.send_to, step.send), (step.recv_from, step.recv)):
        if peer is None and piece.start != piece.stop:
            raise ScheduleError(f"rank {rank}: {step} moves elements but has no peer")
        if peer is not None and (peer == rank or not 0 <= peer < size):
            raise ScheduleError(f"rank {rank}: {step} names a peer that is itself or outside 0..{size - 1}")
        if not 0 <= piece.start <= piece.stop <= length:
            raise ScheduleError(f"rank {rank}: {step} leaves the buffer of {length} elements")
    if max(step.send.start, step.recv.start) < min(step.send.stop, step.recv.stop):
        raise ScheduleError(f"rank {rank}: {step} receives into what it sends")
    halves = (("send", step.send_to, step.send), ("recv", step.recv_from, step.recv))
    return {half for half, peer, piece in halves if peer is not None and piece.start != piece.stop}


def _deliver(step: Step, receiver: int, current: list[Step | None], pending: list[set[str]], state: Execution) -> bool:
    """Move the message `step` of `receiver` waits for, if its sender is at the matching step; say whether it moved."""
    sender = step.recv_from
    assert sender is not None
    sent = current[sender]
    if sent is None or "send" not in pending[sender] or sent.send_to != receiver:
        return False
    message = state.buffers[sender][sent.send]
    target = state.buffers[receiver][step.recv]
    if len(message) != len(target):
        raise ScheduleError(f"rank {sender} sends {sent}, but rank {receiver} receives {step}")
    if step.reduce:
        target += message
    else:
        target[:] = message
    state.elements_sent[sender] += len(message)
    pending[sender].remove("send")
    pending[receiver].remove("recv")
    return True
