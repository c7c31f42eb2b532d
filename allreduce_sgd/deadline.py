"""A deadline for calls that cannot be given one: MPI's start, and the making of its communicators, wait for all ranks.

Nothing brings a thread back from within MPI, and its start keeps Python's other threads from running. So a process of
its own watches: it waits for the end of a pipe, which comes when the call has ended, or when this process has.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["deadline"]

_WATCH = 'timeout "$1" cat >/dev/null; [ $? -ne 124 ] || { echo "$2" >&2; kill -KILL $PPID; }'


@contextmanager
def deadline(seconds: float, who: str, what: str) -> Iterator[None]:
    """Kill this process unless the block ends within so many seconds, which a launcher answers by ending all ranks.

    Before, one line on standard error names `who` waits, for `what`, and how long it did.
    """
    told = f"{who}: {what} not finished after {seconds:g} s; another rank is stuck, gone or late"
    command = ["sh", "-c", _WATCH, "sh", f"{seconds:g}", told]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as watcher:
        try:
            yield
        finally:
            assert watcher.stdin is not None
            watcher.stdin.close()
