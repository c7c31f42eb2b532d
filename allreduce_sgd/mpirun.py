"""Starting ranks on this machine: which mpirun, and which of its options.

What launch/mpirun_local.sh does for the shell: ranks have several threads each, so none is bound to a core; more ranks
than cores take turns; and Open MPI starts for root too.
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from allreduce_sgd.errors import ConfigError

__all__ = ["Launcher", "find_mpirun", "local_launcher"]

_RANKS = ("-np", "{ranks}")
_BANNER_SECONDS = 60


@dataclass(frozen=True)
class Launcher:
    """What starts ranks: a command in which {ranks} stands for their number, and the environment that it needs."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def for_ranks(self, ranks: int) -> list[str]:
        return [word.replace("{ranks}", str(ranks)) for word in self.command]


def find_mpirun() -> list[str]:
    """Return the command that starts ranks: $MPIRUN, or mpirun or mpiexec beside this Python, or on the PATH."""
    named = shlex.split(os.environ.get("MPIRUN", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise ConfigError(f"$MPIRUN: {named[0]} is not a program that can be run")
        return named
    for place in (str(Path(sys.executable).parent), None):
        for name in ("mpirun", "mpiexec"):
            found = shutil.which(name, path=place)
            if found is not None:
                return [found]
    raise ConfigError("no mpirun or mpiexec beside this Python or on the PATH; name one in $MPIRUN")


def local_launcher(oversubscribed: bool) -> Launcher:
    """Return what starts ranks of this machine; `oversubscribed`: more of them than it has cores.

    Where $MPIRUN has options of its own, only these count. Raises ConfigError where there is no mpirun.
    """
    command = find_mpirun()
    if len(command) > 1:
        return Launcher((*command, *_RANKS))
    try:
        banner = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=_BANNER_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise ConfigError(f"{command[0]} --version does not answer: {problem}") from problem
    if "Open MPI" in banner or "OpenRTE" in banner:
        # Without ofi the start takes a second less; messages of ob1 do not use it.
        environment = {"OMPI_MCA_btl": "^ofi"}
        if os.geteuid() == 0:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        options = ["--bind-to", "none"]
        if oversubscribed:
            options += ["--map-by", "slot:OVERSUBSCRIBE"]
            environment["OMPI_MCA_mpi_yield_when_idle"] = "1"
        return Launcher((*command, *options, *_RANKS), environment)
    if "MPICH" in banner or "HYDRA" in banner:
        return Launcher((*command, "-bind-to", "none", *_RANKS))
    return Launcher((*command, *_RANKS))
