"""Which choices of a network interface are refused, for every variable that makes one."""

import subprocess
import sys
from pathlib import Path

import pytest

from allreduce_sgd import interfaces
from allreduce_sgd.interfaces import bound_address, interface_mistake, leave_out_wrong_choice, spans_hosts
from tests.launching import find_mpirun

PRESENT = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.1.0.7", "fe80::1"], "eth1": ["192.168.3.4"], "ib0": []}
HERE = {"MPI_LOCALNRANKS": "2", "PMI_SIZE": "2"}
ELSEWHERE = {"MPI_LOCALNRANKS": "2", "PMI_SIZE": "4"}
GLOO, NCCL, OPEN_MPI, UCX = interfaces.GLOO, interfaces.NCCL, interfaces.OPEN_MPI, interfaces.UCX


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "_addresses", lambda: PRESENT)
    monkeypatch.setattr("psutil.net_if_stats", lambda: {})


@pytest.mark.parametrize(
    ("variable", "value", "wrong"),
    [
        (GLOO, "", None),
        (GLOO, "eth0", None),
        (GLOO, "eth0, eth1", None),
        (GLOO, "eth0,lo", "lo is the loopback"),
        (GLOO, "eth", "there is no interface eth on"),
        (GLOO, "ib0", "ib0 has no address"),
        (NCCL, "eth", None),
        (NCCL, "=eth", "there is no interface =eth"),
        (NCCL, "=eth1", None),
        (NCCL, "^docker,lo", None),
        (NCCL, "lo", "lo is the loopback"),
        (NCCL, "docker,eth1", None),
        (UCX, "all", None),
        (UCX, "mlx5_0:1", None),
        (UCX, "lo,mlx5_0:1", None),
        (UCX, "lo,eth0", None),
        (UCX, "lo", "lo is the loopback"),
        (UCX, "eth9,lo", "there is no interface eth9"),
        (OPEN_MPI, "10.1.0.0/16", None),
        (OPEN_MPI, "10.2.0.0/16", "there is no interface 10.2.0.0/16"),
        (OPEN_MPI, "10.2.0.0/400", "there is no interface 10.2.0.0/400"),
        (OPEN_MPI, "127.0.0.0/8", "lo is the loopback"),
    ],
)
def test_what_serves_between_hosts(variable: str, value: str, wrong: str | None) -> None:
    mistake = interface_mistake(variable, value, between_hosts=True)
    if wrong is None:
        assert mistake is None
    else:
        assert mistake is not None
        assert mistake.startswith(f"{variable}={value}: {wrong}")
        assert mistake.endswith("; interfaces that can serve: eth0, eth1")


def test_on_one_host_the_loopback_serves_and_an_absent_interface_does_not() -> None:
    assert interface_mistake(GLOO, "lo", between_hosts=False) is None
    assert interface_mistake(GLOO, "eth9", between_hosts=False) is not None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (HERE, False),
        (ELSEWHERE, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({"SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_STEP_NUM_NODES": "many"}, False),
    ],
)
def test_ranks_on_other_hosts_are_known_before_mpi_starts(environment: dict[str, str], expected: bool) -> None:
    assert spans_hosts(environment) is expected


def test_a_wrong_choice_is_taken_out_so_that_mpi_can_start() -> None:
    environment = {**ELSEWHERE, UCX: "lo"}
    assert leave_out_wrong_choice(environment, "Open MPI") is None, "UCX is not what Open MPI asks"
    assert UCX in environment
    mistake = leave_out_wrong_choice(environment, "MPICH")
    assert mistake is not None
    assert environment == ELSEWHERE
    alone = {**HERE, UCX: "lo"}
    assert leave_out_wrong_choice(alone, "MPICH") is None
    assert UCX in alone


def test_where_gloo_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound_address("eth1,eth0") == ("192.168.3.4", "the address of eth1")
    known: list[tuple[object, ...]] = []
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: known)
    for resolved, expected in (("10.1.0.7", "10.1.0.7"), ("127.0.1.1", "127.0.1.1"), ("10.9.9.9", "127.0.0.1")):
        known[:] = [(None, None, None, "", (resolved, 0))]
        assert bound_address(None) == (expected, "the address of the name node7")


@pytest.mark.parametrize(
    ("script", "interface", "told"),
    [
        ("mpirun_hosts.sh", "nosuch7", "--interface: this machine has no network interface 'nosuch7', only: lo"),
        ("mpirun_hosts.sh", "lo", "--interface lo: the loopback does not reach other hosts; there are: lo"),
        ("mpirun_local.sh", "nosuch7", "--interface: this machine has no network interface 'nosuch7', only: lo"),
    ],
)
def test_launchers_refuse_a_wrong_interface(tmp_path: Path, script: str, interface: str, told: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1\nnode2\n")
    launch = Path(__file__).parents[1] / "launch" / script
    arguments = [str(hosts)] if script == "mpirun_hosts.sh" else []
    done = subprocess.run(
        [launch, *arguments, "--interface", interface, "--", "--help"],
        env={"PATH": "/usr/bin:/bin", "MPIRUN": find_mpirun(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: {told}")
    assert len(done.stderr.splitlines()) == 1
