"""Signals that ask for a stop: what a process makes of them, and what a run does."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT, finish, start
from tests.test_resume import SLOW, wait_for_step
from tests.test_train import TRAIN, summary_of, train_all

# In "stuck" the main thread is in a computation that no signal interrupts.
PROGRAM = """
import hashlib, sys, time
from allreduce_sgd.preemption import Preemption
from allreduce_sgd.topology import Topology

with Preemption(Topology(host="here"), float(sys.argv[2])) as preemption:
    print("ready", flush=True)
    if sys.argv[1] == "stuck":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    deadline = time.monotonic() + 60
    while not preemption.asked() and time.monotonic() < deadline:
        time.sleep(0.01)
    preemption.settle()
    time.sleep(1)
    sys.exit(75 if preemption.asked() else 1)
"""


@contextmanager
def running(what: str, grace_seconds: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, what, str(grace_seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_who_stops_in_time_ends_as_it_likes(number: signal.Signals) -> None:
    with running("obeying", grace_seconds=0.5) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (75, "")


def test_past_the_grace_period_the_rank_ends_and_says_so() -> None:
    with running("stuck", grace_seconds=0.3) as process:
        # A launcher passes on what the ranks have got already: that is no second signal.
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert errors == (
            "rank 0 of 1 on here: SIGTERM: not at an end with a checkpoint within --grace-seconds 0.3; those that were "
            "written are whole\n"
        )


FORKS = """
import os, signal, sys, time
from allreduce_sgd.preemption import Preemption
from allreduce_sgd.topology import Topology

with Preemption(Topology(host="here"), 1.0) as preemption:
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(50)
            os._exit(0)
    told, other = children
    time.sleep(0.5)
    os.kill(told, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(told, 0)[1]) == -signal.SIGTERM
    time.sleep(0.5)
    assert not preemption.asked()
# The other one still has all that it inherited.
print("left", flush=True)
os.kill(other, signal.SIGKILL)
"""


def test_processes_that_user_code_forks_are_ended_by_signals_and_hold_nothing_up() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(number: signal.Signals, status: int) -> None:
    with running("stuck", grace_seconds=3600) as process:
        # Until it is stuck, which takes computing; before, one SIGINT would do.
        clock = psutil.Process(process.pid)
        computed_seconds, deadline = clock.cpu_times().user, time.monotonic() + 60
        while clock.cpu_times().user < computed_seconds + 0.5 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(number)
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (
            status,
            f"rank 0 of 1 on here: {number.name} a second time: ended at once\n",
        )


def of_rank(job: subprocess.Popen[str], rank: int) -> psutil.Process:
    """Return the process of that rank."""
    for process in psutil.Process(job.pid).children(recursive=True):
        environment = process.environ()
        if environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK")) == str(rank):
            return process
    raise AssertionError(f"no rank {rank}")


def last_checkpoint(folder: Path) -> int:
    return int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))


LOCAL = ["--strategy", "local", "--period", "35", "--momentum", "0.9"]
# What is logged, and what ranks exchange, lies far from where they are to stop.
EVERY = 15


def test_a_signal_stops_at_the_next_step_and_resuming_comes_to_the_same_end(tmp_path: Path) -> None:
    flags = [*SLOW, "--log-every", "1000", "--checkpoint-every", str(EVERY), "--steps", "40"]
    runs = {"usr1": flags, "term": [*flags, *LOCAL]}
    train_all(2, [[*each, "--output", str(tmp_path / f"whole {name}")] for name, each in runs.items()])
    for name, each in runs.items():
        folder = tmp_path / name
        job = start(2, [*TRAIN, *each, "--output", str(folder)], environment={"TEST_STEP_SECONDS": "0.1"})
        # The line of the first checkpoint's step comes before the checkpoint.
        wait_for_step(job, folder, EVERY)
        while not (folder / "checkpoints" / "latest").exists():
            assert job.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        if name == "usr1":
            # As a scheduler does: the launcher gets the signal, and passes it on to the ranks.
            job.send_signal(signal.SIGUSR1)
        else:
            of_rank(job, 1).send_signal(signal.SIGTERM)
        done = finish(job, time.monotonic(), 120)
        assert done.status == 75, done.errors
        assert f"go on with --resume {folder}" in done.output
        assert not (folder / "summary.json").exists()
        assert last_checkpoint(folder) % EVERY
    check_grace_period(tmp_path / "usr1")
    train_all(2, [["--resume", str(tmp_path / name)] for name in runs])
    for name in runs:
        resumed, whole = summary_of(tmp_path / name), summary_of(tmp_path / f"whole {name}")
        assert resumed["parameters_sha256"] == whole["parameters_sha256"]
        assert resumed["train_loss"] == whole["train_loss"]


def check_grace_period(folder: Path) -> None:
    """A resumed run whose step takes longer than the grace period ends, and leaves the checkpoint that it had."""
    before = last_checkpoint(folder)
    job = start(2, [*TRAIN, "--resume", str(folder), "--grace-seconds", "1"], environment={"TEST_STEP_SECONDS": "120"})
    assert job.stdout is not None
    while "results in" not in (line := job.stdout.readline()):
        assert line, job.communicate()
    of_rank(job, 0).send_signal(signal.SIGTERM)
    done = finish(job, time.monotonic(), 60)
    assert done.status not in (0, 2, 75)
    assert done.errors.count("rank 0 of 2 on ") == 1
    assert done.errors.count("not at an end with a checkpoint within --grace-seconds 1") == 1
    assert last_checkpoint(folder) == before
