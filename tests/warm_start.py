"""`mpirun` and `python` as in `launching`, for ranks that need not import torch anew.

A rank takes some three seconds of computing until it has imported torch, and less than one for what most tests want of
it. So a process that has imported torch, and nothing of ours, forks for every rank; see `warm_server`. All else is as
in a rank that was started: its environment, launcher, MPI, streams, exit status and end. What is not: all ranks hash
alike, and the process is no child of the launcher. Tests of starting, killing and signals, and all of tests/mpi, use
`launching` itself.
"""

import atexit
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.launching import ROOT, Finished, environment_with, finish, start

__all__ = ["mpirun", "program", "python"]

_SERVER = Path(__file__).with_name("warm_server.py")
_CLIENT = Path(__file__).with_name("warm_client.py")


@functools.cache
def _folder() -> Path:
    """A folder for the server's socket, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    """The server, which is started the first time, and ends with this process."""
    path = _folder() / "socket"
    server = subprocess.Popen(
        [sys.executable, str(_SERVER), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment_with({"PYTHONPATH": ""}),
    )
    atexit.register(_end, server)
    deadline = time.monotonic() + 240
    while not path.exists():
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < deadline, "the server has not started"
        time.sleep(0.01)
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait(30)


def program() -> list[str]:
    """What to start in place of Python: the client of a server that is up."""
    _server()
    return [sys.executable, "-I", "-S", str(_CLIENT), str(_folder() / "socket")]


def _run(
    ranks: int | None,
    arguments: Sequence[str],
    timeout_seconds: float,
    environment: Mapping[str, str] | None,
    cwd: Path,
) -> Finished:
    client = program()
    started_seconds = time.monotonic()
    return finish(start(ranks, arguments, environment, cwd, client), started_seconds, timeout_seconds)


def mpirun(
    ranks: int,
    arguments: Sequence[str],
    timeout_seconds: float = 120,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Finished:
    """Run python with `arguments`, `-m MODULE ...` or `-c PROGRAM ...`, on that many ranks to its end."""
    return _run(ranks, arguments, timeout_seconds, environment, cwd)


def python(
    arguments: Sequence[str],
    timeout_seconds: float = 120,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Finished:
    """Run python with `arguments`, `-m MODULE ...` or `-c PROGRAM ...`, without any launcher to its end."""
    return _run(None, arguments, timeout_seconds, environment, cwd)
