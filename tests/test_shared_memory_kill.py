"""Shared memory when a rank is killed, and what a rank that waits for a late one costs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launching import finish, mpirun, start
from tests.shared_memory_files import SHM, left_in_shm, names_in_shm

# Reduces for ever, 8 MB in the shared memory of the node and 2 MB through its slots.
FOR_EVER = """
import torch
import allreduce_sgd
comm = allreduce_sgd.connect("mpi", device="cpu", algorithm="shared-memory", timeout_seconds=100.0)
torch.set_num_threads(1)
allocated, private = comm.allocate(2_000_000, torch.float32, torch.device("cpu")), torch.zeros(500_000)
for number in range(10**9):
    works = [comm.all_reduce(allocated, shared_result=number % 2 == 0), comm.all_reduce(private)]
    for work in works:
        work.wait()
    if number == 20 and comm.rank == 0:
        print("going", flush=True)
"""

# Rank 1 comes half a second after rank 0, in turn for each way to wait; rank 0 tells what it took and what it burnt.
LATE = """
import json, time, torch
import allreduce_sgd
from allreduce_sgd.comm.choice import named_choice
comm = allreduce_sgd.connect("mpi", device="cpu", algorithm="shared-memory", timeout_seconds=60.0)
torch.set_num_threads(1)
allocated, private = comm.allocate(1000, torch.float32, torch.device("cpu")), torch.zeros(1_000_000)
def blocking(buffer):
    comm.all_reduce(buffer, blocking=True)
def started(buffer):
    comm.all_reduce(buffer).wait()
def beside_sleep(buffer):
    work = comm.all_reduce(buffer)
    time.sleep(0.5)
    work.wait()
for algorithm in ("shared-memory", "ring"):
    comm.choice = named_choice(algorithm, 1, shared_memory=True, deterministic=False)
    for wait in (blocking, started, beside_sleep):
        for name, buffer in (("allocated", allocated), ("private", private)):
            started(buffer)
            comm.barrier().wait()
            began, cpu_seconds = time.perf_counter(), time.process_time()
            if comm.rank == 1:
                time.sleep(0.5)
                started(buffer)
            else:
                wait(buffer)
                figures = [time.perf_counter() - began, time.process_time() - cpu_seconds]
                print(json.dumps([algorithm, wait.__name__, name, *figures]), flush=True)
comm.close()
"""


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if child.cmdline()[:1] == [sys.executable]]


@pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm here")
@pytest.mark.parametrize("victims", ["one rank", "launcher and ranks"])
def test_a_killed_job_ends_and_leaves_nothing(victims: str) -> None:
    before = names_in_shm()
    process = start(2, ["-c", FOR_EVER])
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    ranks = ranks_of(process)
    assert len(ranks) == 2
    # The memory is there, and has no name that could stay.
    maps = Path(f"/proc/{ranks[0].pid}/maps").read_text()
    assert maps.count("allreduce_sgd-") >= 2
    assert not {name for name in names_in_shm() if "allreduce" in name}
    killed_seconds = time.monotonic()
    for rank in ranks[-1:] if victims == "one rank" else ranks:
        rank.kill()
    if victims == "launcher and ranks":
        process.send_signal(signal.SIGKILL)
    done = finish(process, killed_seconds, timeout_seconds=20)
    assert done.status != 0
    assert done.seconds < 10
    gone, alive = psutil.wait_procs(ranks, timeout=10)
    assert len(gone) == 2, alive
    assert not left_in_shm(before)


def test_waiting_for_a_late_rank_burns_little() -> None:
    done = mpirun(2, ["-c", LATE])
    assert done.status == 0, done.errors
    lines = [json.loads(line) for line in done.output.splitlines()]
    assert len(lines) == 12
    for *what, seconds, cpu_seconds in lines:
        assert 0.45 < seconds < 3, what
        assert cpu_seconds / seconds < 0.5, what
    print(*lines, sep="\n")
