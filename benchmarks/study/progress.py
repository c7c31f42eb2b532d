"""How far a study is: a bar on a terminal, otherwise a line now and then; with the time left."""

import sys
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from benchmarks.study.results import Cell

__all__ = ["Progress"]

_LINE_SECONDS = 30.0


class Progress:
    """Counts the runs of each cell. What is left is estimated from what runs of the same cell took before."""

    def __init__(self, runs: Iterable[Cell]) -> None:
        self._left = Counter(runs)
        self._total = self._left.total()
        self._seconds: dict[Cell, list[float]] = {}
        self._said_seconds = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} runs, {elapsed} so far{postfix}"
            self._bar = tqdm(total=self._total, bar_format=layout, dynamic_ncols=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def starts(self, cell: Cell, lr: float, seed: int) -> None:
        """Be told which run is next."""
        self._show(f"{cell.label}, lr {lr:.3g}, seed {seed}")

    def ended(self, cell: Cell, seconds: float | None) -> None:
        """Be told that it has ended, and how long it took; None for one that was there already."""
        self._left[cell] -= 1
        if seconds is not None:
            self._seconds.setdefault(cell, []).append(seconds)
        if self._bar is not None:
            self._bar.update()

    @property
    def left_seconds(self) -> float | None:
        """What the runs that are left will take; None while no run has been timed."""
        known = [seconds for times in self._seconds.values() for seconds in times]
        if not known:
            return None
        mean = sum(known) / len(known)
        means = {cell: sum(times) / len(times) for cell, times in self._seconds.items()}
        return sum(count * means.get(cell, mean) for cell, count in self._left.items())

    def _show(self, what: str) -> None:
        left = self.left_seconds
        told = "" if left is None else f"about {tqdm.format_interval(round(left))} left; "
        if self._bar is not None:
            self._bar.set_postfix_str(f"{told}{what}")
        elif time.monotonic() - self._said_seconds >= _LINE_SECONDS:
            self._said_seconds = time.monotonic()
            done = self._total - self._left.total()
            print(f"{done} of {self._total} runs done, {told}now {what}", file=sys.stderr, flush=True)
