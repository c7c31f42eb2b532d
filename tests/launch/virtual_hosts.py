"""Running commands on the virtual hosts of launch/virtual_hosts.sh, and finding what they left behind.

A run needs no clean-up by its test: all that it makes ends with the script, even if that is killed.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from tests.launch.requirements import require, require_root

__all__ = [
    "SCRIPT",
    "processes_left",
    "require_virtual_hosts",
    "run_from_host_file",
    "run_on_virtual_hosts",
    "start_on_virtual_hosts",
]

_ROOT = Path(__file__).resolve().parents[2]
SCRIPT = _ROOT / "launch" / "virtual_hosts.sh"
_LIMITED_LINK = "tc qdisc add dev lo root tbf rate 1gbit burst 125000 latency 50ms"
# What the script sets unless it is set already, and what belongs to another launcher that runs these tests.
_PREFIXES = ("OMPI_", "PRTE_", "PMIX_", "PMI_", "UCX_", "GLOO_", "NCCL_", "SLURM_", "HYDRA_")
_NAME = "VIRTUAL_HOSTS_TEST"


def require_virtual_hosts() -> None:
    """Skip the calling test where this machine cannot have virtual hosts, or fail it where root is required."""
    require_root()
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [
        name for name in ("ip", "tc", "unshare", "nsenter", "setpriv", "pkill") if shutil.which(name, path=path) is None
    ]
    require("root", f"virtual hosts need {', '.join(absent)}" if absent else None)
    probe = subprocess.run(
        ["unshare", "--net", *_LIMITED_LINK.split()],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=30,
    )
    require("root", f"no limited links here: {probe.stderr.strip()}" if probe.returncode else None)


def start_on_virtual_hosts(
    command: Sequence[str | Path],
    *flags: str,
    name: str = "",
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start `virtual_hosts.sh FLAGS -- COMMAND` in `folder` with pipes for its output.

    `name` marks the run's processes for `processes_left`. The Python and MPI of the tests come first on the PATH;
    `environment` is added to that of the tests.
    """
    return subprocess.Popen(
        [SCRIPT, *flags, "--", *command],
        env={**_clean_environment(), **(environment or {}), _NAME: name},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_on_virtual_hosts(
    command: Sequence[str | Path],
    *flags: str,
    name: str = "",
    folder: Path | None = None,
    seconds: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `start_on_virtual_hosts`, and wait for the end. Kills the run and raises TimeoutExpired after `seconds`."""
    with start_on_virtual_hosts(command, *flags, name=name, folder=folder, environment=environment) as run:
        try:
            output, errors = run.communicate(timeout=seconds)
        except BaseException:
            run.kill()
            raise
    return subprocess.CompletedProcess(run.args, run.returncode, output, errors)


def processes_left(name: str) -> list[str]:
    """Return the command lines of all living processes of the run called `name`."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_NAME) == name and process.status() != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.cmdline()))
    return left


def run_from_host_file(
    host_file: Path, flags: Sequence[str], hosts: int, rate: str, environment: Mapping[str, str], seconds: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run `launch/mpirun_hosts.sh HOST_FILE --interface eth0 -- FLAGS` beside so many virtual hosts.

    It runs as on a login node. `environment` is added to that of the tests: MPIRUN and PYTHON, PROGRAM. Kills the run
    after `seconds`.
    """
    namespaces = "--net --uts --ipc --mount --pid --fork --kill-child --mount-proc".split()
    launch = SCRIPT.parent
    command: list[str | Path] = ["setsid", "setpriv", "--pdeathsig", "KILL", "unshare", *namespaces]
    command += [launch / "virtual_hosts_cluster.sh", str(hosts), rate, "125000"]
    command += [launch / "mpirun_hosts.sh", host_file, "--interface", "eth0", "--rsh", launch / "virtual_hosts_ssh.sh"]
    return subprocess.run(
        [*command, "--", *flags],
        env={**_clean_environment(), **environment},
        cwd=host_file.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def _clean_environment() -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(_PREFIXES)}
    beside = Path(sys.executable).parent
    clean.update(PYTHONPATH=str(_ROOT), PATH=f"{beside}:{clean.get('PATH', '')}:/usr/sbin:/sbin", OMP_NUM_THREADS="1")
    clean.pop("MPIRUN", None)
    return clean
