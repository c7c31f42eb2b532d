"""What a person watching the run sees: a progress bar on a terminal, plain lines otherwise. Rank 0 only."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

__all__ = ["Display", "number"]

_LINE_SECONDS = 10.0


class Display:
    """Shows progress if `enabled` (rank 0), nothing otherwise."""

    def __init__(self, enabled: bool, total_steps: int, first_step: int) -> None:
        self._enabled = enabled
        self._total_steps = total_steps
        self._said_seconds = time.monotonic()
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=False)

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._said_seconds = time.monotonic()
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._enabled:
            print(text, flush=True)

    def step(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def figures(self, step: int, loss: float | None, accuracy: float | None, samples_per_second: float) -> None:
        """Show the training loss, accuracy and speed of the last steps: beside the bar, or in a line now and then."""
        accuracy_text = "" if accuracy is None else f", accuracy {accuracy:.3f}"
        text = f"loss {number(loss)}{accuracy_text}, {samples_per_second:,.0f} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._enabled and time.monotonic() - self._said_seconds > _LINE_SECONDS:
            # Launchers give ranks a pipe for a terminal, where a bar would only fill the log.
            self.line(f"step {step:6d} of {self._total_steps}   training {text}")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
