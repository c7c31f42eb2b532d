"""Trainings in which something goes wrong, and what they leave behind: no process, no shared memory."""

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from allreduce_sgd.checkpoint import find
from tests.launching import Finished, mpirun
from tests.shared_memory_files import SHM, abandoned_in_shm, left_in_shm

__all__ = ["TRAIN", "assert_nothing_left", "ended_after_fault", "leaving_nothing", "newest_step", "processes_of"]

TRAIN = ["-m", "allreduce_sgd.train", "--steps", "12", "--checkpoint-every", "4", "--batch-size", "16"]
# On a busy machine; a job that waits for its peers' deadline takes 300.
_SOON_SECONDS = 60.0
_NAME = "FAULT_TEST"


def ended_after_fault(folder: Path, fault: str, *flags: str) -> Finished:
    """Train on 2 ranks, of which one meets with `fault` (see victims.py), and check that nothing of it is left.

    The run's folder is `folder`/run.
    """
    fault_time = folder / "fault_time"
    with leaving_nothing() as mark:
        done = mpirun(
            2,
            [*TRAIN, "--model", "tests.faults.victims:victim", "--output", str(folder / "run"), *flags],
            timeout_seconds=200,
            environment={"TEST_FAULT": fault, "TEST_FAULT_TIME": str(fault_time), **mark},
        )
        assert fault_time.exists(), f"{done.output}\n{done.errors}"
        assert time.time() - float(fault_time.read_text()) < _SOON_SECONDS
    return done


@contextlib.contextmanager
def leaving_nothing() -> Iterator[dict[str, str]]:
    """Assert that a job which begins and ends within leaves no process and no shared memory.

    Yields what its environment must have, by which its processes are known from those of others.
    """
    name = str(uuid.uuid4())
    before = abandoned_in_shm() if SHM.is_dir() else None
    yield {_NAME: name}
    assert_nothing_left(name, before)


def assert_nothing_left(name: str, shm_before: set[str] | None) -> None:
    """Assert that no process of the job called `name` lives, and nothing new lies unused in shared memory (None: not
    looked at)."""
    deadline_seconds = time.monotonic() + 15
    while (left := processes_of(name)) and time.monotonic() < deadline_seconds:
        time.sleep(0.2)
    assert left == []
    assert shm_before is None or not left_in_shm(shm_before)


def processes_of(name: str) -> list[str]:
    """Return the command lines of the living processes of the job called `name`."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_NAME) == name and process.status() != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.cmdline()))
    return left


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint of the run in `folder`, which must be intact."""
    found = find(folder)
    assert found.shared()["step"] == found.step
    for rank in range(found.world_size):
        assert found.of_rank(rank)
    return found.step
