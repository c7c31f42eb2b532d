"""A rank that is killed, fails or has no memory left, in every part of a run: all end, the last checkpoint is whole.

The launcher tells of a kill, a rank of what it raised; each once.
"""

import contextlib
import os
import signal
import time
import uuid
from pathlib import Path

import psutil
import pytest

from allreduce_sgd import checkpoint
from allreduce_sgd.comm.single import SingleCommunicator
from tests.faults.jobs import TRAIN, assert_nothing_left, ended_after_fault, newest_step
from tests.launching import finish, mpirun, start
from tests.shared_memory_files import SHM, abandoned_in_shm
from tests.test_resume import wait_for_step

# So that a bucket takes several messages.
RING = ["--algorithm", "ring", "--no-shard-optimizer"]


@pytest.mark.parametrize(
    ("fault", "flags", "checkpoint_step"),
    [
        ("kill start 1 0", [], None),
        ("kill compute 1 6", [], 4),
        ("kill bucket 1 6", RING, 4),
        ("kill checkpoint 0 8", [], 4),
        ("kill evaluation 1 8", ["--evaluate-every", "8"], 4),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_killed_rank_ends_the_job(tmp_path: Path, fault: str, flags: list[str], checkpoint_step: int | None) -> None:
    done = ended_after_fault(tmp_path, fault, *flags)
    assert done.status not in (0, 2, 75)
    # MPICH's and Open MPI's words.
    told = done.output + done.errors
    assert told.count("EXIT CODE: 9") + told.count("exited on signal 9") == 1
    assert "Traceback" not in told
    if checkpoint_step is None:
        assert not (tmp_path / "run").exists()
        return
    assert newest_step(tmp_path / "run") == checkpoint_step
    if "checkpoint" in fault:
        # What was half written is in nobody's way.
        again = mpirun(2, [*TRAIN[:2], "--resume", str(tmp_path / "run")], environment=environment_of(tmp_path, fault))
        assert (again.status, again.errors) == (0, "")
        assert newest_step(tmp_path / "run") == 12
        names = os.listdir(tmp_path / "run" / "checkpoints")
        assert not [name for name in names if name.startswith(".")]


def environment_of(folder: Path, fault: str) -> dict[str, str]:
    return {"TEST_FAULT": fault, "TEST_FAULT_TIME": str(folder / "fault_time")}


@pytest.mark.parametrize(
    ("fault", "where", "told"),
    [
        ("raise hook 1 6", "", "ArithmeticError: the hook went wrong"),
        ("raise progress 1 6", ", thread allreduce-progress", "ArithmeticError: the progress went wrong"),
        ("memory compute 1 6", "", "RuntimeError: [enforce fail"),
    ],
    ids=["hook", "progress thread", "no memory"],
)
def test_what_one_rank_raises_is_told_once(tmp_path: Path, fault: str, where: str, told: str) -> None:
    done = ended_after_fault(tmp_path, fault)
    assert done.status == 1
    assert done.errors.count("rank 1 of 2 on ") == 1, done.errors
    headline = next(line for line in done.errors.splitlines() if line.startswith("rank 1 of 2 on "))
    assert f"{where}: {told}" in headline
    if told.startswith("RuntimeError"):
        assert "memory" in headline
    assert done.errors.count("Traceback") == 1
    assert newest_step(tmp_path / "run") == 4


def test_ctrl_c_twice_ends_all(tmp_path: Path) -> None:
    run, name = tmp_path / "run", str(uuid.uuid4())
    flags = ["--model", "tests.parts:slow_model", "--steps", "2000", "--log-every", "1", "--output", str(run)]
    before = abandoned_in_shm() if SHM.is_dir() else None
    job = start(2, [*TRAIN, *flags], environment={"TEST_STEP_SECONDS": "0.05", "FAULT_TEST": name})
    wait_for_step(job, run, 5)
    interrupted_seconds = time.monotonic()
    # As a terminal does with a launcher that keeps its ranks among its own processes: all get it, twice.
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for pause_seconds in (0.1, 0):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)
        time.sleep(pause_seconds)
    done = finish(job, interrupted_seconds, 60)
    # Seen once: MPICH's launcher, met by the second one while it waits for its proxy, complains and ends with 0.
    assert done.status != 0 or "demux engine error" in done.output + done.errors
    assert "Traceback" not in done.errors
    assert_nothing_left(name, before)
    assert newest_step(run) >= 4


class Killed(BaseException):
    """Ends a checkpoint as a kill does: nothing of it is caught."""


@pytest.mark.parametrize("when", ["before", "half way", "after"])
def test_a_kill_at_any_step_of_writing_leaves_an_intact_checkpoint(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file, rename and flush is met with a kill in turn, until the checkpoint is written whole."""
    left = 0

    def met(action: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed(action)

    def deadly(module: object, name: str) -> None:
        usual = getattr(module, name)

        def act(*arguments: object) -> object:
            if when == "before":
                met(name)
            if when == "half way" and name == "write_file":
                path, data = arguments
                assert isinstance(path, Path)
                assert isinstance(data, bytes | memoryview)
                path.write_bytes(data[: len(data) // 2])
                met(name)
            result = usual(*arguments)
            if when == "after":
                met(name)
            return result

        monkeypatch.setattr(module, name, act)

    def save(step: int) -> None:
        checkpoint.save(tmp_path, step, {"step": step}, {"own": step}, 2, SingleCommunicator())

    save(10)
    save(20)
    for name in ("write_file", "replace_file", "sync_folder"):
        deadly(checkpoint, name)
    deadly(Path, "rename")
    newest, kills = 20, 0
    for attempt in range(1, 100):
        left = attempt
        try:
            save(30)
        except Killed:
            kills += 1
            found = checkpoint.find(tmp_path)
            assert found.step in (newest, 30)
            newest = found.step
            assert found.shared()["step"] == found.step
            continue
        break
    assert kills >= 3
    assert checkpoint.find(tmp_path).step == 30
    assert not list((tmp_path / "checkpoints").glob(".*"))
