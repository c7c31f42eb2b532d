"""Training runs as subprocesses, exactly as a user starts them, and whether a finished one is what is wanted."""

import os
import shlex
import signal
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allreduce_sgd.command_line import Flags, parse, words
from allreduce_sgd.config import to_toml
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.mpirun import find_mpirun

__all__ = [
    "Flags",
    "RunFailed",
    "bytes_per_step",
    "check_same",
    "find_mpirun",
    "train",
    "words",
]

_ENDING_SECONDS = 10
_CONFIG_STATUS = 2
# Where data lie, and how a run is ended, make no other run of it.
_FREE = frozenset({"data-dir", "grace-seconds"})
_VIRTUAL_HOSTS = Path(__file__).parents[1] / "launch" / "virtual_hosts.sh"


class RunFailed(Exception):
    """A run ended with an error or passed its deadline; the text has what it said."""


def train(
    ranks: int,
    flags: Flags,
    timeout_seconds: int,
    program: str = "allreduce_sgd.train",
    rate: str | None = None,
) -> None:
    """Run a training with these flags on so many ranks.

    `program` is the module that trains; `rate`, such as "1gbit", that of the links between virtual hosts, on each of
    which is one rank, None for ranks of this machine. Raises RunFailed, and ConfigError where it refuses the flags.
    """
    environment = dict(os.environ)
    launcher = [] if ranks == 1 else [*find_mpirun(), "-np", str(ranks)]
    if rate is not None:
        environment["MPIRUN"] = find_mpirun()[0]
        launcher = [str(_VIRTUAL_HOSTS), "--hosts", str(ranks), "--ranks-per-host", "1", "--rate", rate, "--"]
    _execute([*launcher, sys.executable, "-m", program, *words(flags)], environment, timeout_seconds)


def bytes_per_step(summaries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median over runs of the bytes sent per rank and step; None where the back end does not tell."""
    known = [run["communication_bytes"] / run["steps"] for run in summaries if run["communication_bytes"] is not None]
    return statistics.median(known) if known else None


def check_same(folder: Path, flags: Flags) -> None:
    """Raise ConfigError where the finished run in `folder` had other flags than these, `_FREE` ones left aside."""
    try:
        had: dict[str, Any] = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError(f"--output: {folder} is there, but is not the folder of a run: {problem}") from problem
    wanted: dict[str, Any] = tomllib.loads(to_toml(parse(words(flags))[0]))
    for name in {**wanted, **had}:
        if name not in _FREE and had.get(name) != wanted.get(name):
            raise ConfigError(
                f"--output: the run in {folder} has --{name} {had.get(name)}, not {wanted.get(name)}; name another "
                f"folder"
            )


def _execute(command: Sequence[str], environment: Mapping[str, str], timeout_seconds: int) -> None:
    said = shlex.join(command)
    # A session of its own, so that the launcher and whatever it starts can be ended together.
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            raise RunFailed(f"not finished after {timeout_seconds} s: {said}") from None
        except BaseException:
            _end(process)
            raise
    if process.returncode == _CONFIG_STATUS:
        told = [line.partition(": error: ")[2] for line in errors.splitlines()]
        raise ConfigError(next(filter(None, told), " ".join(errors.split())))
    if process.returncode != 0:
        raise RunFailed(f"ended with status {process.returncode}: {said}\n{errors.strip()}")


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
