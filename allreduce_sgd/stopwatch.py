"""The clocks of a run: time in training, wall time, and the communication that training caused."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from allreduce_sgd.comm.base import Communicator, Traffic

__all__ = ["Stopwatch"]


class Stopwatch:
    """Counts seconds and traffic of a communicator, separately for what happens within `training()`."""

    def __init__(self, comm: Communicator, device: torch.device) -> None:
        self._comm = comm
        self._device = device
        self._train_seconds = 0.0
        self._started_seconds = time.perf_counter()
        self._wall_before_seconds = 0.0
        self._since_seconds: float | None = None
        self._bytes_sent: int | None = 0
        self._busy_seconds = 0.0
        self._waited_seconds = 0.0
        self._before = Traffic()

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
        self._before = dataclasses.replace(self._comm.traffic)
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
        before, now = self._before, dataclasses.replace(self._comm.traffic)
        if self._bytes_sent is None or before.bytes_sent is None or now.bytes_sent is None:
            self._bytes_sent = None
        else:
            self._bytes_sent += now.bytes_sent - before.bytes_sent
        self._busy_seconds += now.busy_seconds - before.busy_seconds
        self._waited_seconds += now.waited_seconds - before.waited_seconds
        self._before = now

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
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._train_seconds = state["train_seconds"]
        self._wall_before_seconds = state["wall_seconds"]
        self._bytes_sent = state["bytes_sent"]
        self._busy_seconds = state["busy_seconds"]
        self._waited_seconds = state["waited_seconds"]
