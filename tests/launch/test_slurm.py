"""The batch scripts of slurm/ on a real SLURM, with a tiny program in the place of the trainer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launch.requirements import open_mpi, require_slurm
from tests.launch.slurm_cluster import Job, SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ONE_NODE = "slurm/one_node.sbatch"
MANY_NODES = "slurm/many_nodes.sbatch"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.root,
    pytest.mark.skipif(not (BIN / "mpirun").exists(), reason="the environment brings no mpirun (pip install mpich)"),
]

RANKS = """\
import os, sys
from mpi4py import MPI

nodes = MPI.COMM_WORLD.allgather(os.environ["SLURMD_NODENAME"])
if MPI.COMM_WORLD.rank == 0:
    threads = os.environ["OMP_NUM_THREADS"]
    print(f"size={len(nodes)} nodes={','.join(sorted(set(nodes)))} threads={threads} arguments={sys.argv[1:]}")
"""

FAILURE = """\
import sys
from mpi4py import MPI

sys.exit(3 if MPI.COMM_WORLD.rank == 1 else 0)
"""

# The first time it waits for the warning and "saves", as a trainer would; the second time it "resumes". With
# PYTHONUNBUFFERED print() writes a line and its end one after the other, and another rank's line may come between.
PREEMPTED = """\
import os, pathlib, signal, sys, time
from mpi4py import MPI

rank, flag, folder = MPI.COMM_WORLD.rank, sys.argv[-2], pathlib.Path(sys.argv[-1])

def say(text):
    os.write(1, f"rank {rank} {text}\\n".encode())

if flag == "--resume":
    say("resumed")
    sys.exit(0)
warned = []
signal.signal(signal.SIGUSR1, lambda *_: warned.append(1))
if rank == 0:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step-00000001")
MPI.COMM_WORLD.Barrier()
say("runs")
deadline = time.monotonic() + 60
while not warned and time.monotonic() < deadline:
    time.sleep(0.05)
say("warned" if warned else "waited in vain")
sys.exit(75 if warned else 1)
"""

# The MPI (that of the tests' own environment is MPICH), and what starts the ranks.
LAUNCHES = [("own", "mpirun"), ("own", "pmi2"), ("openmpi", "mpirun"), ("openmpi", "pmix")]


def environment(launch: str, program: Path, mpi: str = "own") -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "SLURM_", "PMI"))}
    return {
        **clean,
        "ALLREDUCE_SGD_HOME": str(ROOT),
        "LAUNCH": launch,
        "MPIRUN": str((BIN if mpi == "own" else open_mpi()) / "mpirun"),
        "PROGRAM": str(program),
    }


def submit(cluster: SlurmCluster, folder: Path, launch: str, source: str, *arguments: str, mpi: str = "own") -> Job:
    program = folder / "program.py"
    program.write_text(source)
    return cluster.run(
        [word if not word.startswith("slurm/") else str(ROOT / word) for word in arguments],
        folder=folder,
        environment=environment(launch, program, mpi),
    )


@pytest.mark.parametrize("launch", ["mpirun", "pmi2"])
def test_one_node(slurm: SlurmCluster, tmp_path: Path, launch: str) -> None:
    job = submit(slurm, tmp_path, launch, RANKS, ONE_NODE, "--epochs", "2")
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    assert "size=2 nodes=n1 threads=1" in job.output
    assert f"arguments=['--epochs', '2', '--output', 'runs/slurm-{job.number}']" in job.output


@pytest.mark.parametrize(("mpi", "interface"), [("own", "pmi2"), ("openmpi", "pmix")])
def test_each_mpi_is_started_by_its_interface(slurm: SlurmCluster, tmp_path: Path, mpi: str, interface: str) -> None:
    job = submit(slurm, tmp_path, "", RANKS, ONE_NODE, mpi=mpi)
    assert job.state == "COMPLETED", job.output
    assert f"srun --mpi={interface}" in job.output
    assert "size=2 " in job.output


def test_cpus_per_task_become_threads(slurm: SlurmCluster, tmp_path: Path) -> None:
    options = ["--ntasks-per-node=1", "--cpus-per-task=2"]
    job = submit(slurm, tmp_path, "pmi2", RANKS, *options, ONE_NODE, "--output", "mine")
    assert "size=1 nodes=n1 threads=2 arguments=['--output', 'mine']" in job.output


@pytest.mark.parametrize(("mpi", "launch"), LAUNCHES)
def test_many_nodes(slurm: SlurmCluster, tmp_path: Path, mpi: str, launch: str) -> None:
    job = submit(slurm, tmp_path, launch, RANKS, "--ntasks-per-node=1", MANY_NODES, mpi=mpi)
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    assert "size=2 nodes=n1,n2" in job.output


@pytest.mark.parametrize(
    ("mpi", "launch", "script"), [*((*each, MANY_NODES) for each in LAUNCHES), ("own", "mpirun", ONE_NODE)]
)
def test_failure_is_the_jobs(slurm: SlurmCluster, tmp_path: Path, mpi: str, launch: str, script: str) -> None:
    job = submit(slurm, tmp_path, launch, FAILURE, "--ntasks-per-node=2", script, mpi=mpi)
    assert (job.state, job.exit_status) == ("FAILED", 3), job.output


@pytest.mark.parametrize(
    ("launch", "options", "named"),
    [("pmi3", [ONE_NODE], "pmi3"), ("mpirun", ["--nodes=2", "--ntasks-per-node=1", ONE_NODE], "many_nodes.sbatch")],
)
def test_bad_requests(slurm: SlurmCluster, tmp_path: Path, launch: str, options: list[str], named: str) -> None:
    job = submit(slurm, tmp_path, launch, RANKS, *options)
    assert (job.state, job.exit_status) == ("FAILED", 2)
    assert len(job.output.splitlines()) == 1, job.output
    assert named in job.output


@pytest.mark.parametrize(
    ("mpi", "cases"),
    [("own", {"mpirun": "USR1", "pmi2": "TERM"}), ("openmpi", {"mpirun": "TERM", "pmix": "USR1"})],
    ids=["own", "openmpi"],
)
def test_warned_jobs_are_requeued_and_resume(
    slurm: SlurmCluster, tmp_path: Path, mpi: str, cases: dict[str, str]
) -> None:
    """Both launches at once, each on a node: a requeued job has to wait for some seconds."""
    program = tmp_path / "program.py"
    program.write_text(PREEMPTED)
    jobs = {
        slurm.submit([str(ROOT / ONE_NODE)], folder=tmp_path, environment=environment(launch, program, mpi)): warning
        for launch, warning in cases.items()
    }
    for number, warning in jobs.items():
        slurm.watch(number, tmp_path, lambda output: output.count(" runs\n") == 2)
        # What reaches the script of its own job reaches the ranks as USR1: of TERM their launchers would kill them.
        slurm.command("scancel", "--batch", f"--signal={warning}", str(number))
    for number in jobs:
        job = slurm.wait(number, tmp_path)
        assert job.state == "COMPLETED", job.output
        for rank in range(2):
            assert f"rank {rank} warned" in job.output
            assert f"rank {rank} resumed" in job.output
        assert re.search(rf"--resume runs/slurm-{number}\b", job.output)


def test_help_needs_no_job() -> None:
    for script in (ONE_NODE, MANY_NODES, "slurm/sweep.sbatch", "slurm/search.sbatch", "slurm/study.sbatch"):
        done = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"bash {script} --help" in " ".join(done.stdout.split())
        assert "#SBATCH --" not in done.stdout


def test_cluster_leaves_nothing_behind() -> None:
    require_slurm()
    with pytest.raises(KeyboardInterrupt), SlurmCluster(nodes=1) as cluster:  # noqa: PT012
        configuration = cluster.environment["SLURM_CONF"]
        folder = Path(configuration).parent
        cluster.submit(["--ntasks=1", "--wrap=srun sleep 600"], folder=folder)
        raise KeyboardInterrupt
    assert not folder.exists()
    assert not [process for process in psutil.process_iter() if configuration in words_of(process)]


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join([*process.cmdline(), process.environ().get("SLURM_CONF", "")])
    except psutil.Error:
        return ""


def test_two_clusters_at_once(slurm: SlurmCluster) -> None:
    with SlurmCluster(nodes=1) as second:
        assert second.command("sinfo", "-h", "-N", "-p", "test", "-o", "%N").split() == ["n1"]
        assert slurm.command("sinfo", "-h", "-N", "-p", "test", "-o", "%N").split() == ["n1", "n2"]
