"""A training as processes of its own: started at its place, told to stop, ended.

The launcher (mpirun, or the one rank) is in a session of its own, so that a Ctrl-C at the terminal reaches the sweep
alone, which then asks its trials to stop. Where the sweep is killed, the system sends SIGTERM to the launchers, and the
ranks end with a checkpoint. Launchers also keep the sweep's lock, so that nobody goes on in the folder before.
"""

import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from allreduce_sgd.errors import OutputError
from allreduce_sgd.mpirun import Launcher
from allreduce_sgd.sweep.places import Place

__all__ = ["Process", "last_error", "python_of_trials"]

_PR_SET_PDEATHSIG = 1
_KILL_SECONDS = 5.0
_LOG_TAIL_BYTES = 65536
# Of the trainer for a mistake, and Python's at the end of a traceback, whose other lines are indented.
_ERROR = re.compile(r"\S.*: error: |(?!\s).*\b[A-Z]\w*(Error|Exception|Interrupt|Timeout|Exit)\b")
_LONGEST_ERROR = 300


def python_of_trials() -> list[str]:
    """Return the command in front of `-m allreduce_sgd.train`: $PYTHON, or this Python."""
    return shlex.split(os.environ.get("PYTHON", "")) or [sys.executable]


class Process:
    """Starts the trainer with these arguments; what it says is added to the file `log`. Raises OutputError."""

    def __init__(
        self,
        launcher: Launcher | None,
        ranks: int,
        arguments: Sequence[str],
        place: Place,
        bind: bool,
        log: Path,
        lock: int,
    ) -> None:
        front = [] if launcher is None else launcher.for_ranks(ranks)
        command = [*front, *python_of_trials(), "-m", "allreduce_sgd.train", *arguments]
        environment = _environment(os.environ, launcher, place, bind)
        self._log = log
        self.started_seconds = time.monotonic()
        try:
            with log.open("ab") as file:
                self._log_start = file.tell()
                file.write(f"$ {shlex.join(command)}\n".encode())
                file.flush()
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(lock,),
                    preexec_fn=_in_child(os.getpid(), place.cores if bind else ()),
                )
        except OSError as problem:
            raise OutputError(f"cannot start a trial: {problem.filename or log}: {problem.strerror}") from problem
        self.descriptor = os.pidfd_open(self._process.pid)

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started_seconds

    def status(self) -> int | None:
        """Return the exit status, negative for a signal, None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Have the ranks stop after a checkpoint. Of SIGTERM some launchers kill their ranks."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)

    def terminate(self) -> None:
        """Have the launcher end its ranks now. These may be in process groups of their own."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End all processes now, and return when they have ended, or after a deadline: a disk can hold one up."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)

    def close(self) -> None:
        os.close(self.descriptor)

    def error(self, status: int) -> str:
        """Return a line about why it ended with this status, other than 0."""
        text = last_error(self._log, self._log_start)
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"{how}: {text}" if text else how


def last_error(log: Path, start: int) -> str:
    """Return the last line of the log, from byte `start` on, that reads like an error; else the last line."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(start, file.tell() - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.rstrip() for line in lines if line.strip() and not line.startswith("$ ")]
    errors = [line for line in said if _ERROR.match(line)]
    line = (errors or said or [""])[-1].strip()
    told = line.partition(": error: ")[2] or line
    return "".join(each if each.isprintable() else " " for each in told)[:_LONGEST_ERROR]


def _environment(environment: Mapping[str, str], launcher: Launcher | None, place: Place, bind: bool) -> dict[str, str]:
    """Return the environment of a trial. What is set already is the user's, but for what shares the machine out."""
    own = dict(environment)
    if launcher is not None:
        own = {**launcher.environment, **own}
    if bind:
        own.setdefault("OMP_NUM_THREADS", str(place.threads_per_rank))
        if place.gpus is not None:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
    return own


def _in_child(parent: int, cores: Sequence[int]) -> Callable[[], None]:
    """Return what a child does between fork and exec: nothing that needs a lock another thread may hold."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        if cores:
            os.sched_setaffinity(0, cores)

    return prepare
