"""A deadline for calls that cannot be given one: MPI's start, and the making of its communicators, wait for all ranks.

Nothing brings a thread back from within MPI, and its start keeps Python's other threads from running. So a process of
its own watches: it waits for the end of a pipe, which comes when the call has ended, or when this process has.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["deadline"]

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
    command = ["sh", "-c", _WATCH, "sh", f"{seconds + (_PEER_DELAY_SECONDS if rank > 0 else 0):g}", told]
    try:
        watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    except OSError:
        yield
        return
    with watcher:
        try:
            yield
        finally:
            assert watcher.stdin is not None
            watcher.stdin.close()
