"""The real trainer under a real SLURM: through the batch script, and with the wrong kind of srun."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.root,
    pytest.mark.skipif(not (BIN / "mpirun").exists(), reason="the environment brings no mpirun (pip install mpich)"),
]


def environment(launch: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "SLURM_", "PMI"))}
    return {
        **clean,
        "ALLREDUCE_SGD_HOME": str(ROOT),
        "PYTHONPATH": str(ROOT),
        "LAUNCH": launch,
        "MPIRUN": str(BIN / "mpirun"),
    }


@pytest.mark.parametrize(("launch", "script"), [("pmi2", "one_node"), ("mpirun", "many_nodes")])
def test_training(slurm: SlurmCluster, tmp_path: Path, launch: str, script: str) -> None:
    arguments = ["--ntasks=2", str(ROOT / f"slurm/{script}.sbatch"), "--epochs", "2"]
    job = slurm.run(arguments, folder=tmp_path, environment=environment(launch))
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    summary = json.loads((tmp_path / f"runs/slurm-{job.number}/summary.json").read_text())
    assert (summary["world_size"], summary["epochs"]) == (2, 2)


def test_bad_flag_fails_the_job_with_status_2_and_one_line(slurm: SlurmCluster, tmp_path: Path) -> None:
    arguments = [str(ROOT / "slurm/one_node.sbatch"), "--lr", "fast"]
    job = slurm.run(arguments, folder=tmp_path, environment=environment("pmi2"))
    assert (job.state, job.exit_status) == ("FAILED", 2), job.output
    assert job.output.count("allreduce-sgd: error: --lr: 'fast' is not a number") == 1


def test_srun_that_does_not_connect_the_ranks_is_refused(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\nexec srun --mpi=none -n 2 {sys.executable} -m allreduce_sgd.train\n")
    job = slurm.run(["--ntasks=2", str(script)], folder=tmp_path, environment=environment(""))
    assert job.state == "FAILED", job.output
    assert job.output.count("SLURM started 2 ranks (SLURM_STEP_NUM_TASKS=2), but MPI (MPICH") == 1
    assert not (tmp_path / "runs").exists()
