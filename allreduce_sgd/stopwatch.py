"""The clocks of a run: time in training, wall time, and the communication that training caused."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from allreduce_sgd.comm.base import Communicator

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
        traffic = self._comm.traffic
        bytes_before, busy_before = traffic.bytes_sent, traffic.busy_seconds
        waited_before = traffic.waited_seconds
        self._since_seconds = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._train_seconds, self._since_seconds = self.train_seconds, None
            known = self._bytes_sent is not None and bytes_before is not None and traffic.bytes_sent is not None
            self._bytes_sent = self._bytes_sent + traffic.bytes_sent - bytes_before if known else None  # type: ignore[operator]
            self._busy_seconds += traffic.busy_seconds - busy_before
            self._waited_seconds += traffic.waited_seconds - waited_before

    def communication(self) -> dict[str, Any]:
        """Return this rank's figures so far; bytes are None where the back end does not show them."""
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
