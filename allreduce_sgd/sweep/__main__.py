"""`python -m allreduce_sgd.sweep`: trains with many combinations of hyper-parameters, and tells which was best."""

import argparse
import contextlib
import datetime
import fcntl
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from allreduce_sgd.command_line import words
from allreduce_sgd.durable import replace_file
from allreduce_sgd.errors import ConfigError, OutputError, counted
from allreduce_sgd.mpirun import Launcher, local_launcher
from allreduce_sgd.sweep.arguments import build_parser
from allreduce_sgd.sweep.picture import can_draw, draw
from allreduce_sgd.sweep.places import Place, places
from allreduce_sgd.sweep.plan import check_flags, flags_of, seeds_of
from allreduce_sgd.sweep.results import Results, outcomes
from allreduce_sgd.sweep.runner import Runner, Stop, Stopped
from allreduce_sgd.sweep.search import Trial, all_trials, rungs
from allreduce_sgd.sweep.spec import Spec, parse_spec, read_spec
from allreduce_sgd.sweep.table import as_csv, as_markdown
from allreduce_sgd.toml_file import load_toml
from allreduce_sgd.topology import announced_size

__all__ = ["main"]

_SPEC_FILE, _LOCK_FILE = "sweep.toml", "lock"
# What is left of a sweep that was killed has --grace-seconds to write its checkpoints.
_LOCK_SECONDS = 60.0


def main(arguments: Sequence[str]) -> int:
    """Run the sweep that the arguments ask for, and return the exit status."""
    try:
        return _sweep(build_parser().parse_args(arguments))
    except ConfigError as problem:
        return _complain(problem, 2)
    except OutputError as problem:
        return _complain(problem, 1)


def _complain(problem: Exception, status: int) -> int:
    print(f"allreduce-sgd sweep: error: {problem}", file=sys.stderr, flush=True)
    return status


def _sweep(given: argparse.Namespace) -> int:
    announced = announced_size(os.environ)
    if announced is not None and announced != ("SLURM", 1):
        raise ConfigError(f"{announced[0]}: a sweep starts the ranks of its trials itself; start it without a launcher")
    spec, text = _read(given)
    trials = all_trials(spec)
    refused = {trial.number: check_flags(spec, trial) for trial in trials}
    if all(refused.values()):
        raise ConfigError(f"{given.spec or given.resume}: {refused[0]}")
    if given.dry_run:
        _list(spec, trials, refused)
        return 0
    if given.write_flags is not None:
        _write_flags(given.write_flags, spec, trials)
        return 0
    shared = places(given.ranks, given.ranks_per_trial, os.environ)
    launcher = _launcher(given, shared)
    output = given.resume or _make_folder(given.output, spec)
    with _locked(output) as lock:
        _keep_spec(output, text)
        results = Results(output, trials, given.retry_failed)
        return _run(spec, trials, output, results, shared, given, launcher, lock)


def _read(given: argparse.Namespace) -> tuple[Spec, str]:
    if (given.spec is None) == (given.resume is None):
        raise ConfigError("SPEC and --resume: give one of the two (see --help)")
    if given.resume is None:
        if given.retry_failed:
            raise ConfigError("--retry-failed: only with --resume")
        return read_spec(given.spec)
    if given.output is not None:
        raise ConfigError("--output and --resume: a sweep goes on in its own folder")
    path = given.resume / _SPEC_FILE
    if not path.is_file():
        raise ConfigError(f"--resume: {given.resume} is not the folder of a sweep: it has no {_SPEC_FILE}")
    return parse_spec(path, load_toml(path, "--resume")), path.read_text(encoding="utf-8")


def _launcher(given: argparse.Namespace, shared: Sequence[Place]) -> Launcher | None:
    if given.launcher is not None:
        try:
            command = shlex.split(given.launcher)
        except ValueError as problem:
            raise ConfigError(f"--launcher: {given.launcher!r}: {problem}") from problem
        if not command or shutil.which(command[0]) is None:
            raise ConfigError(f"--launcher: {given.launcher!r} does not begin with a program that can be run")
        if not any("{ranks}" in word for word in command):
            raise ConfigError(f"--launcher: {given.launcher!r} does not say {{ranks}}, where their number goes")
        return Launcher(tuple(command))
    if given.ranks_per_trial == 1:
        return None
    return local_launcher(any(given.ranks_per_trial > len(place.cores) for place in shared))


def _make_folder(output: Path | None, spec: Spec) -> Path:
    if output is None:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        output = Path("runs") / f"sweep-{now}-{spec.name}"
    try:
        if output.exists() and not output.is_dir():
            raise ConfigError(f"--output: {output} is a file; name a folder that is new or empty")
        if output.exists() and any(output.iterdir()):
            raise ConfigError(
                f"--output: the folder {output} is already used; name a new one, or go on in it with --resume {output}"
            )
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"--output: cannot write into {output}: {problem.strerror}") from problem
    return output


def _keep_spec(output: Path, text: str) -> None:
    try:
        if not (output / _SPEC_FILE).exists():
            replace_file(output / _SPEC_FILE, text)
        (output / "trials").mkdir(exist_ok=True)
    except OSError as problem:
        raise OutputError(f"cannot write into {output}: {problem.strerror}") from problem


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Hold the sweep's folder alone: neither another sweep nor trials that a killed one has left are at work in it."""
    try:
        lock = os.open(output / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as problem:
        raise ConfigError(f"cannot write into {output}: {problem.strerror}") from problem
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        told = False
        while not _lock(lock):
            if time.monotonic() > deadline:
                raise ConfigError(f"{output}: another sweep is at work there, or trials that it has left")
            if not told:
                print(f"waiting for trials that are still at work in {output}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
        yield lock
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks.
        pass
    return True


def _run(
    spec: Spec,
    trials: Sequence[Trial],
    output: Path,
    results: Results,
    shared: Sequence[Place],
    given: argparse.Namespace,
    launcher: Launcher | None,
    lock: int,
) -> int:
    bind = given.launcher is None
    at_once = f"{counted(len(shared), 'trial')} of {counted(given.ranks_per_trial, 'rank')} at once"
    threads = f", {counted(shared[0].threads_per_rank, 'core')} per rank" if bind else ""
    print(f"{spec.name}: {counted(len(trials), 'trial')}, {spec.method}; {at_once}{threads}; results in {output}")
    if not can_draw():
        print("no picture without matplotlib: pip install 'allreduce_sgd[report]'", flush=True)
    with Stop() as stop:
        try:
            Runner(spec, trials, output, results, shared, given.ranks_per_trial, launcher, bind, lock, stop).run()
        except Stopped as stopped:
            # Without the picture: whoever stops a sweep may not wait for long.
            _report(spec, trials, output, results, picture=False)
            print(f"stopped; go on with --resume {output}", flush=True)
            return stopped.status
    _report(spec, trials, output, results, picture=can_draw())
    best = outcomes(spec, trials, results)[0]
    if best.value is None:
        return _complain(OutputError(f"all trials failed; the first: {best.error}"), 1)
    flags = shlex.join(words(best.trial.parameters))
    print(f"best: trial {best.trial.number}, {spec.metric} {best.value:.6g}: {flags}")
    return 0


def _report(spec: Spec, trials: Sequence[Trial], output: Path, results: Results, picture: bool) -> None:
    """Write the table, and where wanted the picture, of what has ended, and print the table."""
    found = outcomes(spec, trials, results)
    if not found:
        return
    markdown = as_markdown(spec, found)
    print(f"\n{markdown}", flush=True)
    try:
        replace_file(output / "table.md", markdown)
        replace_file(output / "table.csv", as_csv(spec, found))
        if picture:
            draw(spec, found, output / "parallel.png")
    except OSError as problem:
        raise OutputError(f"cannot write into {output}: {problem.strerror}") from problem


def _list(spec: Spec, trials: Sequence[Trial], refused: dict[int, str | None]) -> None:
    for trial in trials:
        why = refused[trial.number]
        told = f"   # refused: {why}" if why else ""
        print(f"{trial.number:3d}  {shlex.join(words(trial.parameters))}{told}")
    seeds = f", each with {spec.seeds} seeds" if spec.seeds > 1 else ""
    print(f"{counted(len(trials), 'trial')}{seeds}; of all: {shlex.join(words(spec.trainer))}")
    if spec.halving is not None:
        going, stages = len(trials), []
        for reach in rungs(spec.halving):
            stages.append(f"{going} up to {reach}")
            going = -(-going // spec.halving.eta)
        print(f"{spec.halving.unit}: {', '.join(stages)}")


def _write_flags(path: Path, spec: Spec, trials: Sequence[Trial]) -> None:
    if spec.halving is not None:
        raise ConfigError("--write-flags: which trials of halving go on is not known before; take grid or random")
    lines = [shlex.join(words(flags_of(spec, trial, seed))) for trial in trials for seed in seeds_of(spec, trial)]
    try:
        replace_file(path, "".join(f"{line}\n" for line in lines))
    except OSError as problem:
        raise ConfigError(f"--write-flags: cannot write {path}: {problem.strerror}") from problem
    print(f"{counted(len(lines), 'line')}: sbatch --array=1-{len(lines)} slurm/sweep.sbatch {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
