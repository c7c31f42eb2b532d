"""The command line of a sweep, and its help, which tells what a spec is."""

import argparse
from pathlib import Path
from typing import NoReturn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.sweep.spec import shipped

__all__ = ["build_parser"]

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

under SLURM: one job on one node, whose cores the trials share, started by mpirun; warned, it is requeued and goes on;
  sbatch --cpus-per-task=16 slurm/search.sbatch SPEC.toml --ranks-per-trial 4
  in a job on several nodes srun starts the trials, and finds them free cores (--exact);
  ... SPEC.toml --ranks 32 --ranks-per-trial 8 --launcher 'srun --mpi=pmi2 --exact --ntasks={ranks} --cpus-per-task=1'
  in an array job each training of grid or random is a job of its own
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; for a mistake it raises ConfigError."""
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
