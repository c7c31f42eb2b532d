"""What jobs leave in /dev/shm: files there outlive the processes that made them."""

import os
import time
from pathlib import Path

import psutil

__all__ = ["SHM", "abandoned_in_shm", "left_in_shm", "names_in_shm"]

SHM = Path("/dev/shm")
_WAIT_SECONDS = 15.0


def names_in_shm() -> set[str]:
    return set(os.listdir(SHM))


def abandoned_in_shm() -> set[str]:
    """Return the files in /dev/shm that no process uses: other jobs may run on this machine."""
    used = set()
    for process in psutil.process_iter():
        try:
            used |= {Path(mapped.path).name for mapped in process.memory_maps() if mapped.path.startswith(f"{SHM}/")}
            used |= {Path(file.path).name for file in process.open_files() if file.path.startswith(f"{SHM}/")}
        except psutil.Error:
            continue
    return names_in_shm() - used


def left_in_shm(before: set[str]) -> set[str]:
    """Return what nobody uses and was not there `before`, once it has had time to go."""
    deadline_seconds = time.monotonic() + _WAIT_SECONDS
    # Files of other jobs, which are about to start, lie there unused for a moment.
    while (left := abandoned_in_shm() - before) and time.monotonic() < deadline_seconds:
        time.sleep(0.2)
    return left
