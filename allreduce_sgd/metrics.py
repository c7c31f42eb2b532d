"""What a run measures: sums over samples on all ranks, and the files metrics.jsonl and summary.json."""

import contextlib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.durable import replace_file
from allreduce_sgd.errors import ConfigError, OutputError

__all__ = ["MetricsLog", "Tally", "Totals", "check_tensorboard", "write_json"]


@dataclass(frozen=True)
class Totals:
    """Sums over samples: of the loss, of the samples, of right predictions and of predictions."""

    loss: float = 0.0
    samples: int = 0
    correct: int = 0
    predictions: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.loss + other.loss,
            self.samples + other.samples,
            self.correct + other.correct,
            self.predictions + other.predictions,
        )

    def __sub__(self, other: "Totals") -> "Totals":
        return Totals(
            self.loss - other.loss,
            self.samples - other.samples,
            self.correct - other.correct,
            self.predictions - other.predictions,
        )

    @staticmethod
    def of(sums: Sequence[float]) -> "tuple[Totals, bool]":
        """Return the totals, and whether any rank asks, from the sums of what `Tally.take` gives on all ranks."""
        loss, samples, correct, predictions, asking = sums
        return Totals(loss, int(samples), int(correct), int(predictions)), asking > 0

    @property
    def mean_loss(self) -> float | None:
        return self.loss / self.samples if self.samples else None

    @property
    def accuracy(self) -> float | None:
        """The fraction of right predictions, None where the task has none (regression)."""
        return self.correct / self.predictions if self.predictions else None


@dataclass
class Tally:
    """Collects a rank's losses; values stay on their device until `reduce`, so that no step waits for a GPU."""

    _losses: list[Tensor] = field(default_factory=list)
    _samples: list[int] = field(default_factory=list)
    _correct: list[Tensor] = field(default_factory=list)
    _predictions: int = 0

    def add(self, mean_loss: Tensor, samples: int, correct: Tensor | None, predictions: int) -> None:
        """Count a batch with this mean loss; `correct` is None where nothing is predicted."""
        self._losses.append(mean_loss.detach())
        self._samples.append(samples)
        if correct is not None:
            self._correct.append(correct)
            self._predictions += predictions

    def reduce(
        self, comm: Communicator, measures: Mapping[str, float] | None = None
    ) -> tuple[Totals, dict[str, float]]:
        """Return the sums over all ranks, and those of `measures`, and start afresh.

        All ranks must call, with measures of the same names; the same bits everywhere.
        """
        measures = measures or {}
        sums = torch.cat([self.take(), torch.tensor(list(measures.values()), dtype=torch.float64)])
        comm.all_reduce(sums).wait()
        totals, _ = Totals.of(sums[:5].tolist())
        return totals, dict(zip(measures, sums[5:].tolist(), strict=True))

    def take(self, ask: bool = False) -> Tensor:
        """Return this rank's sums, float64: loss, samples, right predictions, predictions, `ask`; and start afresh."""
        sums = torch.zeros(5, dtype=torch.float64)
        sums[4] = ask
        if self._losses:
            losses = torch.stack([loss.float() for loss in self._losses]).double().cpu()
            sums[0] = losses @ torch.tensor(self._samples, dtype=torch.float64)
            sums[1] = sum(self._samples)
        if self._correct:
            sums[2] = float(torch.stack(self._correct).sum())
            sums[3] = self._predictions
        self._losses, self._samples, self._correct, self._predictions = [], [], [], 0
        return sums


def check_tensorboard(wanted: bool) -> None:
    """Raise ConfigError where TensorBoard files are wanted and cannot be written."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard: the package tensorboard is not installed; pip install tensorboard")


class MetricsLog:
    """Appends lines to metrics.jsonl, each flushed, and optionally to TensorBoard. One rank has it.

    Raises OutputError where metrics.jsonl cannot be opened or written. A line may then be cut short; a resumed run
    drops it.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self._path = folder / "metrics.jsonl"
        with _writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be flushed before cannot be now.
        with _writing(self._path) if error is None else contextlib.suppress(OSError):
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Write one line: `event` ("train", "evaluation", ...), the step, and the values."""
        with _writing(self._path):
            self._file.write(json.dumps(_finite({"event": event, "step": step, **values})) + "\n")
            self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._writer.add_scalar(f"{event}/{name}", value, step)
            self._writer.flush()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file under a temporary name, and rename it. Numbers that are not finite become null.

    Raises OutputError where it cannot be written.
    """
    with _writing(path):
        replace_file(path, json.dumps(_finite(value), indent=2) + "\n")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise OutputError(f"cannot write {path}: {problem.strerror}") from problem


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
