"""One rank of what `benchmarks.startup` measures: a training whose phases are told apart by when they end.

`mpirun -np N python -m benchmarks.startup_rank --marks FOLDER --launched SECONDS [flags of training]` writes
FOLDER/rank-R.json: the seconds of each phase.
"""

import time

_STARTED_SECONDS = time.monotonic()

# ruff: noqa: E402 - the clock is read before anything is imported
import argparse
import contextlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["MARKS", "main"]

MARKS = ("launch", "imports", "MPI", "data", "building", "first step")
"""The phases, in their order."""


def main(arguments: Sequence[str]) -> int:
    """Train, write the seconds of each phase where it came to its end, and return the exit status of the training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("--launched", type=float, required=True)
    options, flags = parser.parse_known_args(arguments)
    marks = [options.launched, _STARTED_SECONDS]

    from allreduce_sgd import train
    from allreduce_sgd.data import registry
    from allreduce_sgd.strategies.server import build
    from allreduce_sgd.strategies.synchronous import Synchronous
    from allreduce_sgd.topology import launcher_rank
    from allreduce_sgd.trainer import Trainer

    assert build, Trainer  # with these two comes all that a training imports
    marks.append(time.monotonic())
    _mark_end(train, "discover", marks)
    _mark_end(registry, "load_dataset", marks)
    step = Synchronous.step

    def marked_step(self: Synchronous, share: Any) -> None:
        marks.append(time.monotonic())
        step(self, share)
        marks.append(time.monotonic())

    Synchronous.step = marked_step  # type: ignore[method-assign]
    with contextlib.redirect_stdout(io.StringIO()):
        status = train.main(flags)
    if status == 0:
        seconds = [after - before for before, after in itertools.pairwise(marks)]
        (options.marks / f"rank-{launcher_rank(os.environ)}.json").write_text(
            json.dumps(dict(zip(MARKS, seconds, strict=True)))
        )
    return status


def _mark_end(module: Any, name: str, marks: list[float]) -> None:
    """Have the function of this name note when it ends."""
    function: Callable[..., Any] = getattr(module, name)

    def marked(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        marks.append(time.monotonic())
        return result

    setattr(module, name, marked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
