"""What a benchmark leaves behind: a JSON record that says what was measured, by which code, on which machine."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mpi4py
import psutil

from allreduce_sgd.durable import replace_file

__all__ = ["processor", "provenance", "write_record"]

_PACKAGES = ("torch", "numpy", "mpi4py")
_GIT_SECONDS = 10


def write_record(path: Path, benchmark: str, arguments: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the record of `benchmark`, called with `arguments`. Rows hold what JSON has: no infinities."""
    record = {**provenance(benchmark, arguments), "rows": rows}
    replace_file(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def provenance(benchmark: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what was run, by which code, on which machine."""
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments]),
        "commit": _commit(),
        "machine": _machine(),
        "versions": _versions(),
    }


def _commit() -> str | None:
    """Return the commit of this tree, with "-dirty" where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        # Over 1, 5 and 15 minutes; the benchmark itself is part of it.
        "load_average": list(os.getloadavg()),
    }


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("allreduce_sgd", *_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["mpi"] = _mpi_library()
    return found


def _mpi_library() -> str | None:
    # Importing mpi4py.MPI would initialise MPI in a process that only launches others.
    mpi4py.rc.initialize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return " ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ").split())
