"""Tickets for workers at their own speed: the first server counts them, and every worker asks it for the next.

One round trip of two headers per step and worker. See `strategies/pace.py` for what a ticket is.
"""

from collections.abc import Sequence

import torch

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.strategies.pace import REPORTED, Pace, Ticket
from allreduce_sgd.strategies.server.messages import Kind, Post

__all__ = ["ServedPace", "Tickets"]


class Tickets:
    """The first server's side: which ticket is next, and the sums of the reports. `clients` take them."""

    def __init__(self, clients: Sequence[int]) -> None:
        self._clients = list(clients)
        self._first = 0
        self._until = 0
        self._given = 0
        self.totals = [0.0] * REPORTED
        self.inside: list[int] = []
        """The clients that have not been told yet that the stretch has ended; none between stretches."""

    def open(self, first: int, until: int) -> None:
        self._first, self._until, self._given = first, max(first, until), 0
        self.totals = [0.0] * REPORTED
        self.inside = list(self._clients)

    def take(self, client: int, report: Sequence[float]) -> Ticket | None:
        self.totals = [total + one for total, one in zip(self.totals, report, strict=True)]
        if report[-1] > 0:
            self._until = min(self._until, self._first - -self._given // len(self._clients))
        steps, part = divmod(self._given, len(self._clients))
        if self._first + steps >= self._until:
            if client in self.inside:
                self.inside.remove(client)
            return None
        self._given += 1
        return Ticket(self._first + steps, part)

    def close(self) -> int:
        """Return the step that training stands at."""
        self.inside = []
        return self._until


class ServedPace(Pace):
    """The workers' side. `workers` is their communicator, `keeper` the first server's rank of `post.comm`."""

    def __init__(self, post: Post, keeper: int, workers: Communicator) -> None:
        self._post = post
        self._keeper = keeper
        self._workers = workers

    def open(self, first: int, until: int) -> None:
        if self._workers.rank == 0:
            self._post.ask(self._keeper, Kind.OPEN, (first, until))
        self._workers.barrier().wait()
        self.totals = (0.0,) * REPORTED

    def take(self, report: Sequence[float]) -> Ticket | None:
        self._post.training = True
        given, step, part, *totals = self._post.ask(self._keeper, Kind.TAKE, report).numbers
        self._post.training = False
        self.totals = totals[:REPORTED]
        return Ticket(int(step), int(part)) if given else None

    def close(self) -> int:
        # The keeper has all reports once every worker has been told of the end.
        self._workers.barrier().wait()
        outcome = torch.zeros(1 + REPORTED, dtype=torch.float64)
        if self._workers.rank == 0:
            outcome.copy_(torch.tensor(self._post.ask(self._keeper, Kind.CLOSE).numbers[: 1 + REPORTED]))
        step, *self.totals = self._workers.broadcast(outcome).wait().tolist()
        return int(step)
