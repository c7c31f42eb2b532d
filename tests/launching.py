"""How tests start several ranks, and what they get back."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["ROOT", "Finished", "find_mpirun", "mpirun", "python", "start"]

ROOT = Path(__file__).parent.parent
# A launcher's variables would tell the ranks started here that they belong to another job.
_FOREIGN = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "MPI_LOCAL", "HYDRA_")

# Open MPI refuses root and more ranks than cores unless told otherwise; MPICH does not look at these.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl": "^ofi",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass(frozen=True)
class Finished:
    status: int
    output: str
    errors: str
    seconds: float


def find_mpirun() -> str:
    """Return the mpirun of this Python's environment, or the one on the PATH; without one the test is skipped."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun: install an MPI, for instance `pip install mpich`")
    return found


def environment_with(changes: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**kept, **_OPEN_MPI, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def start(
    ranks: int | None,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    program: Sequence[str] = (sys.executable,),
) -> subprocess.Popen[str]:
    """Start python with `arguments` on that many ranks (None: without a launcher), in a process group of its own."""
    launcher = [] if ranks is None else [find_mpirun(), "-n", str(ranks)]
    return subprocess.Popen(
        [*launcher, *program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment_with(environment or {}),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], started_seconds: float, timeout_seconds: float) -> Finished:
    """Wait for the job; one that outlasts its time is killed, and the test fails."""
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"still running after {timeout_seconds} s\n{output}\n{errors}")
    return Finished(process.returncode, output, errors, time.monotonic() - started_seconds)


def mpirun(
    ranks: int,
    arguments: Sequence[str],
    timeout_seconds: float = 120,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Finished:
    """Run python with `arguments` on that many ranks to its end."""
    started_seconds = time.monotonic()
    return finish(start(ranks, arguments, environment, cwd), started_seconds, timeout_seconds)


def python(
    arguments: Sequence[str],
    timeout_seconds: float = 120,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Finished:
    """Run python with `arguments` without any launcher to its end."""
    started_seconds = time.monotonic()
    return finish(start(None, arguments, environment, cwd), started_seconds, timeout_seconds)
