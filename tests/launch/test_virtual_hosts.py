"""Virtual hosts: what ranks see, that traffic between hosts passes the limited links, and that nothing is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.launch.virtual_hosts import (
    SCRIPT,
    processes_left,
    require_virtual_hosts,
    run_on_virtual_hosts,
    start_on_virtual_hosts,
)

RATE_BITS = 100e6
ELEMENTS = 2 << 20
BUFFER_BYTES = 4 * ELEMENTS

TOPOLOGY = """
import json, os, socket
from allreduce_sgd.topology import discover
place = discover()
view = {"rank": place.rank, "node": place.node, "nodes": place.nodes, "local_rank": place.local_rank,
        "local_size": place.local_size, "host": place.host, "address": socket.gethostbyname(place.host)}
# In one write each, so that lines of several ranks stay whole.
os.write(1, (json.dumps(view) + "\\n").encode())
"""

ALL_REDUCE = f"""
import json, os, pathlib, socket, time
import torch
from allreduce_sgd import connect

def received_bytes():
    return int(pathlib.Path("/sys/class/net/eth0/statistics/rx_bytes").read_text())

comm = connect("mpi", timeout_seconds=60)
data = torch.arange({ELEMENTS}, dtype=torch.float32).remainder_(1000).add_(comm.rank)
comm.all_reduce(torch.ones(4)).wait()
before = received_bytes()
comm.barrier().wait()
start = time.monotonic()
comm.all_reduce(data).wait()
end = time.monotonic()
after = received_bytes()
size = comm.size
expected = torch.arange({ELEMENTS}, dtype=torch.float32).remainder_(1000).mul_(size).add_(size * (size - 1) // 2)
report = {{"host": socket.gethostname(), "right": torch.equal(data, expected), "before": before, "after": after,
          "start": start, "end": end}}
comm.close()
os.write(1, (json.dumps(report) + "\\n").encode())
"""

# Leaves a file and a process behind, notes its namespace in FOLDER/host, and goes on or ends as it is told.
UNTIDY = """
import os, pathlib, socket, subprocess, sys, time
name, ending, folder = sys.argv[1:]
from mpi4py import MPI
pathlib.Path("/dev/shm", name).write_text("left")
subprocess.Popen(["sleep", "300"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
pathlib.Path(folder, socket.gethostname()).write_text(os.readlink("/proc/self/ns/net"))
MPI.COMM_WORLD.Barrier()
os.write(1, b"ready\\n")
if ending == "wait":
    time.sleep(300)
if ending == "fail" and MPI.COMM_WORLD.rank == 1:
    MPI.COMM_WORLD.Abort(3)
"""


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def elapsed_seconds(reports: list[dict[str, Any]]) -> float:
    """Return the time from the first rank's start to the last one's end: ranks leave a barrier at different times."""
    return float(max(report["end"] for report in reports) - min(report["start"] for report in reports))


def received_bytes(reports: list[dict[str, Any]], host: str) -> int:
    """Return what came over the host's link: unlike what was sent, none of it can be on its way when a rank is done."""
    mine = [report for report in reports if report["host"] == host]
    return int(max(report["after"] for report in mine) - min(report["before"] for report in mine))


def network_namespaces() -> set[str]:
    """Return the network namespaces that a process lives in or a mount holds."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(link))
        except OSError:
            continue
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " nsfs " in line:
            found.add(line.split()[3])
    return found


def namespaces_of_hosts(folder: Path) -> set[str]:
    namespaces = {(folder / host).read_text() for host in ("host1", "host2")}
    assert len(namespaces) == 2
    return namespaces


def assert_nothing_left(name: str, namespaces: set[str]) -> None:
    deadline_seconds = time.monotonic() + 5
    # The kernel ends the processes of a dead PID namespace at once, but not before the script's own end is seen.
    while processes_left(name) and time.monotonic() < deadline_seconds:
        time.sleep(0.05)
    assert processes_left(name) == []
    assert not namespaces & network_namespaces()
    assert not Path("/dev/shm", name).exists()
    assert not {device for _, device in socket.if_nameindex() if device.startswith("port")}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--hosts", "0", "true"], "--hosts"),
        (["--hosts", "65", "true"], "at most 64"),
        (["--hosts", "99999999999999999999", "true"], "at most 64"),
        (["--ranks-per-host", "two", "true"], "'two'"),
        (["--rate", "5", "true"], "--rate"),
        (["--rate", "0gbit", "true"], "0gbit"),
        (["--rate"], "--rate wants a value"),
        (["--mpi", "lam", "true"], "'lam'"),
        (["--latency", "1ms", "true"], "--latency"),
        (["--hosts", "2", "--"], "no command"),
        ([], "no command"),
    ],
)
def test_bad_arguments_give_one_line(arguments: list[str], named: str) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stdout == ""
    assert named in done.stderr
    assert done.stderr.startswith("virtual_hosts.sh: ")
    assert len(done.stderr.splitlines()) == 1


def test_help_is_the_header() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "--round-robin" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.root
class TestOnHosts:
    @pytest.fixture(autouse=True)
    def needs_virtual_hosts(self) -> None:
        require_virtual_hosts()

    @pytest.mark.parametrize("ranks_per_host", [1, 2])
    @pytest.mark.parametrize("placement", ["contiguous", "round-robin"])
    def test_ranks_see_their_hosts(self, ranks_per_host: int, placement: str) -> None:
        flags = ["--ranks-per-host", str(ranks_per_host), *(["--round-robin"] if placement == "round-robin" else [])]
        places = lines(run_on_virtual_hosts([sys.executable, "-c", TOPOLOGY], *flags))
        assert sorted(place["rank"] for place in places) == list(range(2 * ranks_per_host))
        for place in places:
            rank = place.pop("rank")
            node, local_rank = divmod(rank, ranks_per_host)
            if placement == "round-robin":
                local_rank, node = divmod(rank, 2)
            assert place == {
                "node": node,
                "nodes": 2,
                "local_rank": local_rank,
                "local_size": ranks_per_host,
                "host": f"host{node + 1}",
                "address": f"10.77.0.{node + 1}",
            }

    @pytest.mark.parametrize("ranks_per_host", [1, 2])
    def test_no_byte_passes_beside_the_link(self, ranks_per_host: int) -> None:
        flags = ["--rate", "100mbit", "--ranks-per-host", str(ranks_per_host)]
        reports = lines(run_on_virtual_hosts([sys.executable, "-c", ALL_REDUCE], *flags))
        assert len(reports) == 2 * ranks_per_host
        assert all(report["right"] for report in reports)
        # Each host must receive at least one buffer's worth, whatever the algorithm. A millisecond's burst is free.
        assert elapsed_seconds(reports) >= 8 * BUFFER_BYTES / RATE_BITS - 0.001
        for host in ("host1", "host2"):
            assert received_bytes(reports, host) >= BUFFER_BYTES

    def test_ranks_of_one_host_do_not_use_the_link(self) -> None:
        flags = ["--hosts", "1", "--ranks-per-host", "2"]
        reports = lines(run_on_virtual_hosts([sys.executable, "-c", ALL_REDUCE], *flags))
        assert [report["right"] for report in reports] == [True, True]
        assert received_bytes(reports, "host1") < BUFFER_BYTES / 100

    def test_two_runs_do_not_meet(self) -> None:
        runs = [start_on_virtual_hosts([sys.executable, "-c", TOPOLOGY]) for _ in range(2)]
        try:
            results = [run.communicate(timeout=60) for run in runs]
        finally:
            for run in runs:
                run.kill()
        assert [run.returncode for run in runs] == [0, 0], results
        assert [len(output.splitlines()) for output, _ in results] == [2, 2]

    @pytest.mark.parametrize("ending", ["end", "fail"])
    def test_nothing_is_left(self, ending: str, tmp_path: Path) -> None:
        name = f"virtual-hosts-{uuid.uuid4()}"
        done = run_on_virtual_hosts([sys.executable, "-c", UNTIDY, name, ending, str(tmp_path)], name=name)
        assert done.returncode == (3 if ending == "fail" else 0), done.stderr
        assert_nothing_left(name, namespaces_of_hosts(tmp_path))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
    def test_nothing_is_left_after_a_signal(self, number: signal.Signals, tmp_path: Path) -> None:
        name = f"virtual-hosts-{uuid.uuid4()}"
        command = [sys.executable, "-c", UNTIDY, name, "wait", str(tmp_path)]
        with start_on_virtual_hosts(command, name=name) as run:
            try:
                assert run.stdout is not None
                assert [run.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
                namespaces = namespaces_of_hosts(tmp_path)
                assert namespaces <= network_namespaces()
                assert len(processes_left(name)) > 4
                run.send_signal(number)
                assert run.wait(timeout=60) != 0
            finally:
                run.kill()
        assert_nothing_left(name, namespaces)
