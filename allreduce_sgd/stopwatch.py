"""The clocks of a run: time in training, wall time, and the communication that training caused."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from allreduce_sgd.comm.base import Account, Communicator

__all__ = ["Stopwatch"]


class Stopwatch:
    """Counts seconds and traffic of communicators, separately for what happens within `training()`.

    `comm` is that of the ranks that train, over which averages are taken; `others` are counted too.
    """

    def __init__(self, comm: Communicator, device: torch.device, others: Sequence[Communicator] = ()) -> None:
        self._comm = comm
        self._comms = [comm, *others]
        self._device = device
        self._train_seconds = 0.0
        self._started_seconds = time.perf_counter()
        self._wall_before_seconds = 0.0
        self._since_seconds: float | None = None
        self._bytes_sent: int | None = 0
        self._busy_seconds = 0.0
        self._waited_seconds = 0.0
        self._before = Account()
        self._causes_before: dict[str, list[Any]] = {}

    @property
    def train_seconds(self) -> float:
        """Seconds within `training()`, those of the runs resumed from included."""
        running = 0.0 if self._since_seconds is None else time.perf_counter() - self._since_seconds
        return self._train_seconds + running

    @property
    def wall_seconds(self) -> float:
        """Seconds since this was made, those of the runs resumed from included."""
        return self._wall_before_seconds + time.perf_counter() - self._started_seconds

    @contextmanager
    def training(self) -> Iterator[None]:
        """Count what happens within as training; work queued on a GPU is waited for at the end."""
        self._before = self._moved()
        self._since_seconds = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._train_seconds, self._since_seconds = self.train_seconds, None
            self._add_traffic()

    def _add_traffic(self) -> None:
        """Count what the communicator has moved since this was called last, within `training()`."""
        before, now = self._before, self._moved()
        if self._bytes_sent is None or before.bytes_sent is None or now.bytes_sent is None:
            self._bytes_sent = None
        else:
            self._bytes_sent += now.bytes_sent - before.bytes_sent
        self._busy_seconds += now.busy_seconds - before.busy_seconds
        self._waited_seconds += now.waited_seconds - before.waited_seconds
        self._before = now

    def _moved(self) -> Account:
        return _total([each.traffic for each in self._comms])

    def waited_seconds(self) -> float:
        """Return how long this process has waited for communication, in training and out of it."""
        return sum(each.traffic.waited_seconds for each in self._comms)

    def causes(self) -> dict[str, dict[str, Any]]:
        """Return this rank's figures by cause, in training and out of it: bytes, seconds, and those waited for."""
        names = dict.fromkeys([*self._causes_before, *(name for each in self._comms for name in each.traffic.causes)])
        found = {}
        for name in names:
            accounts = [each.traffic.causes[name] for each in self._comms if name in each.traffic.causes]
            total = _total([Account(*self._causes_before.get(name, [])), *accounts])
            if total.busy_seconds > 0:
                found[name] = {
                    "bytes": total.bytes_sent,
                    "seconds": total.busy_seconds,
                    "exposed_seconds": total.waited_seconds,
                }
        return found

    def communication(self) -> dict[str, Any]:
        """Return this rank's figures so far; bytes are None where the back end does not show them."""
        if self._since_seconds is not None:
            self._add_traffic()
        return {
            "communication_bytes": self._bytes_sent,
            "communication_seconds": self._busy_seconds,
            "exposed_communication_seconds": self._waited_seconds,
        }

    def average_over_ranks(self) -> dict[str, Any]:
        """Return the mean over ranks of `communication`. All ranks must call."""
        known = self._bytes_sent is not None
        sums = torch.tensor([self._bytes_sent or 0, self._busy_seconds, self._waited_seconds], dtype=torch.float64)
        self._comm.all_reduce(sums).wait()
        sent, busy, waited = (sums / self._comm.size).tolist()
        return {
            "communication_bytes": round(sent) if known else None,
            "communication_seconds": busy,
            "exposed_communication_seconds": waited,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
            "bytes_sent": self._bytes_sent,
            "busy_seconds": self._busy_seconds,
            "waited_seconds": self._waited_seconds,
            "causes": {name: list(figures.values()) for name, figures in self.causes().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._train_seconds = state["train_seconds"]
        self._wall_before_seconds = state["wall_seconds"]
        self._bytes_sent = state["bytes_sent"]
        self._busy_seconds = state["busy_seconds"]
        self._waited_seconds = state["waited_seconds"]
        self._causes_before = state["causes"]


def _total(accounts: Sequence[Account]) -> Account:
    sent = [each.bytes_sent for each in accounts]
    return Account(
        None if None in sent else sum(each or 0 for each in sent),
        sum(each.busy_seconds for each in accounts),
        sum(each.waited_seconds for each in accounts),
    )
