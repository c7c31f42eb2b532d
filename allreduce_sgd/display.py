"""What a person watching the run sees: a progress bar on a terminal, plain lines otherwise. Rank 0 only."""

import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

__all__ = ["Display", "number"]


class Display:
    """Shows progress if `enabled` (rank 0), nothing otherwise."""

    def __init__(self, enabled: bool, total_steps: int, first_step: int) -> None:
        self._enabled = enabled
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
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._enabled:
            print(text, flush=True)

    def step(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def figures(self, loss: float | None, accuracy: float | None, samples_per_second: float) -> None:
        """Show the training loss, accuracy and speed of the last steps beside the bar."""
        if self._bar is not None:
            accuracy_text = "" if accuracy is None else f", accuracy {accuracy:.3f}"
            self._bar.set_postfix_str(f"loss {number(loss)}{accuracy_text}, {samples_per_second:,.0f} samples/s")


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
