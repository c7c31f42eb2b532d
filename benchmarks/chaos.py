"""Does every failed run end, and every resume lead to the same model? `python -m benchmarks.chaos`, without mpirun.

A training on digits is started, harmed at a random time, and resumed from what it left, again and again until it has
come to its end; then the next one begins, until all rounds are over. A round is one start of the ranks. What is done:

- kill-rank        SIGKILL to one rank
- kill-launcher    SIGKILL to mpirun
- kill-all         SIGKILL to mpirun and all that it started
- terminate        SIGTERM to mpirun
- preempt          SIGUSR1 to mpirun, which asks for a checkpoint and status 75
- stop-rank        SIGSTOP to one rank: the others wait for their deadline (seldom, since it takes that long)

A third of the times are drawn from the whole run, and the others, once it trains, from what is left of its training.

A round is in order where all processes of the job have ended within the deadline after the harm, and what it left can
be resumed; a course of rounds where its final parameters are those of the undisturbed run, bit for bit. The exit status
is 1 where anything was not in order; the run's folder is then kept. What has no checkpoint yet begins anew. Ended early
by SIGINT or SIGTERM, it ends its ranks, and reports the rounds that are done.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from allreduce_sgd.errors import ConfigError, counted
from benchmarks.arguments import Parser, check_writable, positive_int, positive_number
from benchmarks.chaos_rounds import HARMS, Chaos, Round
from benchmarks.interrupts import ended_in_order
from benchmarks.record import write_record
from benchmarks.runs import RunFailed, find_mpirun
from benchmarks.table import format_number, format_table

__all__ = ["main", "rows_of", "table"]


def main(arguments: Sequence[str]) -> int:
    """Run the rounds and return the exit status."""
    try:
        options = _parse(arguments)
    except ConfigError as problem:
        print(f"chaos: error: {problem}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="allreduce-sgd-chaos-", dir=options.folder))
    chaos = Chaos(folder, options.ranks, _flags(options), options.deadline_seconds, random.Random(options.seed))
    rounds: list[Round] = []
    try:
        chaos.undisturbed()
        for done in _rounds(chaos, options.rounds, options.minutes):
            rounds.append(done)
    except ConfigError as problem:
        print(f"chaos: error: {problem}", file=sys.stderr)
        return 2
    except RunFailed as problem:
        print(f"chaos: the undisturbed run failed: {problem}", file=sys.stderr)
        return 1
    finally:
        # Also where it is ended early: rounds that are done are worth telling.
        if rounds:
            _report(rounds, options, arguments)
        in_order = all(done.problem is None for done in rounds)
        if in_order:
            shutil.rmtree(folder)
        else:
            print(f"kept: {folder}")
    return 0 if in_order else 1


def _report(rounds: Sequence[Round], options: argparse.Namespace, arguments: Sequence[str]) -> None:
    rows = rows_of(rounds)
    print(table(rows))
    problems = [done for done in rounds if done.problem is not None]
    finished = sum(done.finished and done.problem is None for done in rounds)
    print(
        f"{counted(len(rounds), 'round')} of {options.rounds}, seed {options.seed}: {counted(finished, 'run')} came to "
        f"the end with the parameters of the undisturbed run; {counted(len(problems), 'problem')}"
    )
    for done in problems:
        print(f"course {done.course}, {done.harm}: {done.problem}")
    if options.json is not None:
        write_record(options.json, "chaos", arguments, rows)


def _rounds(chaos: Chaos, rounds: int, minutes: float | None) -> Iterator[Round]:
    """Yield rounds, so many or for so long, and then those that bring the present course to its end."""
    until_seconds = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    with tqdm(total=rounds, unit="round", leave=False, disable=not sys.stderr.isatty()) as bar:
        for _ in range(rounds):
            done = chaos.round()
            bar.set_postfix_str(f"{done.course} runs at their end, last: {done.harm or 'nothing'}")
            bar.update()
            yield done
            if time.monotonic() > until_seconds:
                break
        while chaos.run.exists():
            yield chaos.round(harmed=False)


def rows_of(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Return a row for each kind of harm: how many rounds, how they ended, and how long the slowest took to."""
    rows = []
    for harm in [*HARMS, None]:
        of_it = [done for done in rounds if done.harm == harm]
        if of_it:
            ended = [done.ended_after_seconds for done in of_it if done.ended_after_seconds is not None]
            statuses = sorted({done.status for done in of_it if done.status is not None})
            rows.append(
                {
                    "harm": harm or "none",
                    "rounds": len(of_it),
                    "resumed": sum(done.resumed_step is not None for done in of_it),
                    "statuses": {str(status): sum(done.status == status for done in of_it) for status in statuses},
                    "slowest_end_seconds": max(ended, default=None) if harm is not None else None,
                    "finished": sum(done.finished and done.problem is None for done in of_it),
                    "problems": [asdict(done) for done in of_it if done.problem is not None],
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["harm", "rounds", "of them resumed", "at the end", "slowest end, s", "problems", "status: rounds"]
    lines = [
        [
            row["harm"],
            str(row["rounds"]),
            str(row["resumed"]),
            str(row["finished"]),
            format_number(row["slowest_end_seconds"]),
            str(len(row["problems"])),
            ", ".join(f"{status}: {count}" for status, count in row["statuses"].items()),
        ]
        for row in rows
    ]
    return format_table(header, lines)


def _flags(options: argparse.Namespace) -> dict[str, str | int | float]:
    return {
        "hidden": "64,64",
        "batch-size": 16,
        "steps": options.steps,
        "checkpoint-every": options.checkpoint_every,
        "log-every": options.checkpoint_every,
        "keep-checkpoints": 2,
        "evaluate-every": 10 * options.checkpoint_every,
        "strategy": options.strategy,
        "threads": 1,
        "device": "cpu",
        "timeout-seconds": options.timeout_seconds,
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("chaos", "Kill and resume runs at random; it starts mpirun itself.")
    add = parser.add_argument
    add("--rounds", type=positive_int, default=500, metavar="N", help="starts of the ranks")
    add("--minutes", type=positive_number, metavar="X", help="begin no more rounds after so long")
    add("--ranks", type=positive_int, default=2, metavar="N", help="ranks of a run")
    add("--seed", type=int, default=0, metavar="N", help="of what is done, and when")
    add("--strategy", default="sync", metavar="NAME", help="strategy, as for training")
    add("--steps", type=positive_int, default=1000, metavar="N", help="steps of a run")
    add("--checkpoint-every", type=positive_int, default=20, metavar="N", help="steps between two checkpoints")
    add("--deadline-seconds", type=positive_number, default=60.0, metavar="X", help="within which a round must end")
    add("--timeout-seconds", type=positive_number, default=20.0, metavar="X", help="for which ranks wait for a peer")
    add("--folder", type=Path, metavar="DIR", help="where runs are made; default: the system's temporary folder")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    if options.timeout_seconds >= options.deadline_seconds:
        raise ConfigError(f"--timeout-seconds {options.timeout_seconds:g}: choose less than --deadline-seconds")
    if options.folder is not None and not options.folder.is_dir():
        raise ConfigError(f"--folder {options.folder}: there is no such folder")
    check_writable("--json", options.json)
    find_mpirun()
    return options


if __name__ == "__main__":
    with ended_in_order():
        sys.exit(main(sys.argv[1:]))
