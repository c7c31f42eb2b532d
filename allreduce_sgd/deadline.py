"""A deadline for calls that cannot be given one: MPI's start and end, and the making of its communicators, wait for all
ranks.

Nothing brings a thread back from within MPI, whose start and end keep Python's other threads from running. So a process
of its own watches: it waits for the end of a pipe, which comes when the call has ended, or when this process has.
"""

import atexit
import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["deadline", "deadline_of_exit"]

# 143 is what other programs of the name end with than GNU's.
_WATCH = 'timeout "$1" cat >/dev/null; case $? in 124 | 143) echo "$2" >&2; kill -KILL $PPID ;; esac'
# So that of many ranks that wait for one, rank 0 has ended the job before the others would say the same.
_PEER_DELAY_SECONDS = 1.0


@contextmanager
def deadline(seconds: float, rank: int, who: str, what: str) -> Iterator[None]:
    """Kill this process unless the block ends within so many seconds, which a launcher answers by ending all ranks.

    Before, one line on standard error names `who` waits, for `what`, and how long it did. Where no process can be
    started to watch, there is no deadline.
    """
    told = f"{who}: {what} not finished after {seconds:g} s; another rank is stuck, gone or late"
    try:
        watcher = subprocess.Popen(_watching(seconds, rank, told), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    except OSError:
        yield
        return
    with watcher:
        try:
            yield
        finally:
            assert watcher.stdin is not None
            watcher.stdin.close()


def deadline_of_exit(seconds: float, rank: int, who: str) -> None:
    """Kill this process where its exit, from Python's exit handlers on, takes longer than that. To be called once.

    MPI is ended after all handlers, and waits for the other ranks there. Where no process can be started to watch,
    there is no deadline.
    """
    told = f"{who}: the end of MPI not finished after {seconds:g} s; this rank or another is stuck, gone or late"
    atexit.register(_watch_exit, _watching(seconds, rank, told))


def _watch_exit(command: list[str]) -> None:
    # No file object, which Python closes before MPI is ended: descriptors last as long as the process.
    with contextlib.suppress(OSError):
        reading, _writing = os.pipe()
        silent = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
        os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0), silent])


def _watching(seconds: float, rank: int, told: str) -> list[str]:
    return ["sh", "-c", _WATCH, "sh", f"{seconds + (_PEER_DELAY_SECONDS if rank > 0 else 0):g}", told]
