"""How far a sweep is: a line for every training that ends, and on a terminal a bar, with the time left."""

import sys
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """Counts units of work, of which so many places each do one after another."""

    def __init__(self, units: int, places: int) -> None:
        self._units = units
        self._done = 0
        self._places = places
        self._timed_units = 0
        self._timed_seconds = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar}| {elapsed} so far{postfix}"
            self._bar = tqdm(total=units, bar_format=layout, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Self:
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
        else:
            print(text, flush=True)

    def running(self, trials: str) -> None:
        """Show which trials are under way."""
        if self._bar is not None:
            left = self.left_seconds
            told = "" if left is None else f", about {tqdm.format_interval(round(left))} left"
            self._bar.set_postfix_str(f"{told.removeprefix(', ')}; now {trials}" if told else f"now {trials}")

    def ended(self, units: int, seconds: float | None) -> None:
        """Be told that so many units are done, and how long they took; None for those that tell nothing of others."""
        self._done += units
        if seconds is not None:
            self._timed_units += units
            self._timed_seconds += seconds
        if self._bar is not None:
            self._bar.update(units)

    @property
    def share(self) -> str:
        """How much is done, and how long the rest will take, for a line."""
        left = self.left_seconds
        told = "" if left is None or self._done >= self._units else f", about {tqdm.format_interval(round(left))} left"
        return f"{100 * self._done // max(1, self._units)} %{told}"

    @property
    def left_seconds(self) -> float | None:
        """What is left will take, at the mean of what was timed; None while nothing was."""
        if not self._timed_units:
            return None
        return (self._units - self._done) * self._timed_seconds / self._timed_units / self._places
