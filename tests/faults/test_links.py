"""A link between two hosts that goes down: for 10 seconds the job goes on, for good it ends at the deadline.

Rank 1's host takes its own interface down, as root of its network namespace.
"""

import re
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.faults.jobs import TRAIN, newest_step
from tests.launch.virtual_hosts import processes_left, require_virtual_hosts, run_on_virtual_hosts
from tests.test_train import lines_of, summary_of

# The model of tests/faults/victims.py cannot: on the other host nobody knows its environment but by MPI's launcher.
CUT = """
import subprocess, sys
from allreduce_sgd import stepper, train

take_step = stepper.Stepper._take

def cut_and_take_step(self, step, *arguments):
    if step == 5 and self._comm.rank == 1:
        subprocess.Popen(["sh", "-c", sys.argv[1]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    take_step(self, step, *arguments)

stepper.Stepper._take = cut_and_take_step
sys.exit(train.main(sys.argv[2:]))
"""

DOWN = "ip link set eth0 down"


@pytest.mark.root
class TestLinks:
    @pytest.fixture(autouse=True)
    def needs_virtual_hosts(self) -> None:
        require_virtual_hosts()

    def test_a_link_that_comes_back_after_10_seconds_costs_only_time(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        flags = [*TRAIN[2:], "--log-every", "1", "--output", str(run)]
        command = [sys.executable, "-c", CUT, f"{DOWN}; sleep 10; ip link set eth0 up", *flags]
        done = run_on_virtual_hosts(command, folder=tmp_path, seconds=200)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert summary_of(run)["steps"] == 12
        seconds = {line["step"]: line["train_seconds"] for line in lines_of(run) if line["event"] == "train"}
        # It was down in the midst of training.
        assert seconds[7] - seconds[5] > 8

    def test_a_link_that_stays_down_ends_the_job_at_the_deadline(self, tmp_path: Path) -> None:
        name = str(uuid.uuid4())
        flags = [*TRAIN[2:], "--log-every", "1000", "--output", str(tmp_path / "run"), "--timeout-seconds", "15"]
        done = run_on_virtual_hosts([sys.executable, "-c", CUT, DOWN, *flags], name=name, folder=tmp_path, seconds=200)
        assert done.returncode not in (0, 2, 75), done.stdout
        told = r"rank 0 of 2 on host1: CommunicationTimeout: step \d+: bucket \d of \d: .*"
        told += r"not finished after 15 s; rank 1 has not answered; rank 0 has come to it"
        assert re.search(told, done.stderr), done.stderr
        assert done.stderr.count("rank 0 of 2 on host1: ") == 1
        deadline_seconds = time.monotonic() + 15
        while processes_left(name) and time.monotonic() < deadline_seconds:
            time.sleep(0.1)
        assert processes_left(name) == []
        assert newest_step(tmp_path / "run") == 4
