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
from typing import NoReturn

from allreduce_sgd.command_line import words
from allreduce_sgd.durable import replace_file
from allreduce_sgd.errors import ConfigError, OutputError, counted
from allreduce_sgd.mpirun import Launcher, local_launcher
from allreduce_sgd.sweep.picture import can_draw, draw
from allreduce_sgd.sweep.places import Place, places
from allreduce_sgd.sweep.plan import check_flags, flags_of, seeds_of
from allreduce_sgd.sweep.results import Results, outcomes
from allreduce_sgd.sweep.runner import Runner, Stop, Stopped
from allreduce_sgd.sweep.search import Trial, all_trials, rungs
from allreduce_sgd.sweep.spec import Spec, parse_spec, read_spec, shipped
from allreduce_sgd.sweep.table import as_csv, as_markdown
from allreduce_sgd.toml_file import load_toml
from allreduce_sgd.topology import announced_size

__all__ = ["main"]

_SPEC_FILE, _LOCK_FILE = "sweep.toml", "lock"
# What is left of a sweep that was killed has --grace-seconds to write its checkpoints.
_LOCK_SECONDS = 60.0

_DESCRIPTION = """\
Train with many combinations of hyper-parameters, several at once, each by an mpirun of its own:

  python -m allreduce_sgd.sweep SPEC.toml --ranks 8 --ranks-per-trial 2      4 trials of 2 ranks at once
  python -m allreduce_sgd.sweep --resume runs/sweep-...                      goes on where it was stopped or killed
  python -m allreduce_sgd.sweep SPEC.toml --dry-run                          prints the trials

It is not to be started by mpirun itself. Trials share the cores (and GPUs): each has its own, and as many threads per
rank as cores come to it, unless OMP_NUM_THREADS or `threads` says otherwise."""
_EPILOG = """\
the spec, a TOML file; every flag of the trainer may stand in [trainer], with one value, or in [parameters]:

  method = "random"               # grid: all combinations; random: so many trials; halving: see below
  trials = 20
  metric = "test_loss"            # default test_accuracy; also validation_loss, validation_accuracy, train_loss,
                                  #   train_seconds, wall_seconds, samples_per_second
  goal = "min"                    # or "max"; default: what suits the metric
  seed = 0                        # of the search: the same seed draws the same trials
  seeds = 3                       # trains each trial with 3 values of --seed; the median counts (default 1)
  timeout_seconds = 600           # a training that takes longer has failed (default: no limit)

  [trainer]
  dataset = "digits"
  epochs = 10

  [parameters]
  lr = {low = 0.001, high = 1.0, log = true}      # a range; uniform in its logarithm
  momentum = [0.0, 0.9]                           # a list
  hidden = {values = ["64", "512,512"]}           # the same, as a table
  batch-size = {low = 16, high = 256, log = true} # whole numbers, since the flag takes these only (else integer = true)
  # in a grid a range needs points = N: so many values from low to high

successive halving: `trials` random combinations (or all of a grid) train for `smallest` epochs; the best third (eta =
3) goes on to 3 times as many, and so on to `largest`. Trials are paused and go on from their checkpoints, and their
learning rate takes its course to `largest` from the start: one that is never dropped is trained as without halving.

  method = "halving"
  trials = 27
  [halving]
  smallest = 1
  largest = 27
  eta = 3
  unit = "epochs"                 # or "steps"

the sweep's folder (--output) holds sweep.toml, results.jsonl (a line per training that ended), table.md and table.csv
(best first), parallel.png (parallel coordinates; needs matplotlib: the extra `report`), and trials/NNN, the folders of
the trainer, with NNN.log beside them. A training that fails is recorded with its last line, and stops nothing.

SIGINT, SIGTERM or SIGUSR1 has all trials write a checkpoint and end; a second one ends them at once. A trial that was
killed goes on from its latest checkpoint (checkpoint-every in [trainer]), or begins afresh.

under SLURM: one job of one task, whose cores the trials share, starts them with mpirun;
  sbatch --ntasks=1 --cpus-per-task=16 --wrap 'python -m allreduce_sgd.sweep SPEC.toml --ranks-per-trial 4'
  trials on several nodes of a job are started by srun, which finds them free cores (--exact):
  ... SPEC.toml --ranks 32 --ranks-per-trial 8 --launcher 'srun --mpi=pmi2 --exact --ntasks={ranks} --cpus-per-task=1'
  and an array job trains each of grid or random as a job of its own:
  ... SPEC.toml --write-flags flags.txt;  sbatch --array=1-20 slurm/sweep.sbatch flags.txt

environment: MPIRUN (default: mpirun beside this Python or on the PATH; one with options of its own gets no others),
PYTHON (of the trials; default: this one).

exit status: 0 done (also where trials failed), 1 all trials failed, or a file could not be written; 2 bad arguments or
spec; 75 stopped by SIGTERM or SIGUSR1, 130 by SIGINT, to go on with --resume."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(" ".join(message.split()).removeprefix("argument "))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m allreduce_sgd.sweep",
        usage="python -m allreduce_sgd.sweep SPEC [options], or --resume DIR [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("spec", metavar="SPEC", nargs="?", help=f"a TOML file, or a shipped one: {', '.join(shipped())}")
    add("--resume", metavar="DIR", type=Path, help="go on in this folder of a sweep, with the spec that stands there")
    add("--retry-failed", action="store_true", help="with --resume: also try again what has failed")
    add("--output", metavar="DIR", type=Path, help="the sweep's folder, new or empty; default runs/sweep-<time>-<name>")
    add("--ranks", metavar="N", type=_positive, help="ranks of all trials together; default: one per core")
    add("--ranks-per-trial", metavar="N", type=_positive, default=1, help="ranks of each trial (default 1: no mpirun)")
    add(
        "--launcher",
        metavar="COMMAND",
        help="what starts the ranks of a trial, instead of mpirun, with {ranks} for their number; it finds them cores",
    )
    add("--dry-run", action="store_true", help="print the trials with their flags, and end")
    add("--write-flags", metavar="FILE", type=Path, help="write a line of flags per training, and end")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the sweep that the arguments ask for, and return the exit status."""
    try:
        return _sweep(_parser().parse_args(arguments))
    except ConfigError as problem:
        return _complain(problem, 2)
    except OutputError as problem:
        return _complain(problem, 1)


def _complain(problem: Exception, status: int) -> int:
    print(f"allreduce-sgd sweep: error: {problem}", file=sys.stderr, flush=True)
    return status


def _sweep(given: argparse.Namespace) -> int:
    announced = announced_size(os.environ)
    if announced is not None and announced[0] != "SLURM":
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
