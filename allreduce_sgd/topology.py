"""Who am I: rank, size, node, local rank, launcher, device and threads of this process.

Rank and size come from MPI's world communicator and the node from `Split_type(COMM_TYPE_SHARED)`, never from a
scheduler's variables: under `mpirun` inside one SLURM node every rank sees SLURM_PROCID=0. The variables serve for one
thing, to notice that a launcher started several ranks which MPI does not connect (the wrong launcher or `--mpi=` type
starts N separate runs, each of size one, with status 0), and that is refused.

Importing `mpi4py.MPI` initialises MPI, so it happens inside `discover`, and only where a launcher is at work.
"""

import contextlib
import itertools
import os
import pickle
import socket
import stat
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from allreduce_sgd.deadline import deadline, deadline_of_exit
from allreduce_sgd.errors import CommunicationTimeout, ConfigError
from allreduce_sgd.interfaces import leave_out_wrong_choice

if TYPE_CHECKING:
    import torch

__all__ = ["Topology", "announced_size", "discover", "launcher_rank", "remove_abandoned"]

T = TypeVar("T")

# The launchers' own words come first: inside a SLURM allocation SLURM_STEP_NUM_TASKS may describe an outer step.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH", "PMI_SIZE", "PMI_RANK"),
)
# As MPICH 5 and Open MPI 5 name their shared memory.
_MPI_FILES = ("mpich_shm_*", "sm_segment.*", "osc_sm.*", "ucx_shm_*")
_SLURM = ("SLURM", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


@dataclass(frozen=True)
class Topology:
    """Where this process stands among the ranks of the job.

    `world` is mpi4py's COMM_WORLD, or None where the process runs alone; `mpi_lock` is the lock under which one thread
    at a time calls MPI.
    """

    rank: int = 0
    size: int = 1
    node: int = 0
    nodes: int = 1
    local_rank: int = 0
    local_size: int = 1
    cores: int = 1
    host: str = "localhost"
    launcher: str = "none"
    world: Any = None
    mpi_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    timeout_seconds: float = 300.0

    def describe(self) -> str:
        return f"rank {self.rank} of {self.size} on {self.host}"

    def agree(self, function: Callable[[], T], timeout_seconds: float | None = None) -> T:
        """Call `function` and return its result, unless it raised ConfigError on any rank; then raise that on all.

        All ranks must call. The error raised is the one of the lowest rank that has one, with `rank` set, so that
        one rank can print it and all can end alike. `timeout_seconds` is the deadline, if not the topology's own.
        """
        result: T | None = None
        error: str | None = None
        try:
            result = function()
        except ConfigError as problem:
            error = str(problem)
        for rank, (text, host) in enumerate(self.gather_all((error, self.host), timeout_seconds)):
            if text is not None:
                # Where the first rank is well, what is wrong may be this host's alone.
                agreed = ConfigError(text if rank == 0 else f"{text} (rank {rank} on {host})")
                agreed.rank = rank
                raise agreed
        return result  # type: ignore[return-value]  # no error here, so function returned a T

    def broadcast(self, value: T) -> T:
        """Return rank 0's `value`, which must be picklable, on every rank. All ranks must call."""
        return self.gather_all(value if self.rank == 0 else None)[0]  # type: ignore[return-value]  # rank 0's

    def gather_all(self, value: T, timeout_seconds: float | None = None) -> list[T]:
        """Return the picklable `value` of every rank, in rank order. All ranks must call.

        Polls without burning the core, and raises CommunicationTimeout past the deadline.
        """
        if self.world is None:
            return [value]
        limit_seconds = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        data = bytearray(pickle.dumps(value))
        lengths = array("q", [0] * self.size)
        self._poll(lambda: self.world.Iallgather(array("q", [len(data)]), lengths), limit_seconds)
        everyone = bytearray(sum(lengths))
        self._poll(lambda: self.world.Iallgatherv(data, [everyone, lengths.tolist()]), limit_seconds)
        ends = list(itertools.accumulate(lengths))
        return [pickle.loads(everyone[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def _poll(self, start: Callable[[], Any], limit_seconds: float) -> None:
        deadline_seconds = time.monotonic() + limit_seconds
        with self.mpi_lock:
            request = start()
        pause_seconds = 0.0001
        while True:
            with self.mpi_lock:
                if request.Test():
                    return
            if time.monotonic() > deadline_seconds:
                raise CommunicationTimeout(
                    f"{self.describe()}: the other ranks did not come to agree within {limit_seconds:g} s"
                )
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 0.002)

    def abort(self, status: int) -> NoReturn:
        """End all ranks of the job at once, with this exit status where the launcher passes it on."""
        for stream in (sys.stdout, sys.stderr):
            # On a full disk, or with nobody left to read: the other ranks must end all the same.
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if self.world is not None and self.size > 1:
            # Without the lock: another thread may be stuck inside MPI holding it, and nothing comes after this call.
            self.world.Abort(status)
        os._exit(status)

    def choose_device(self, requested: str = "auto") -> "torch.device":
        """Return this rank's device for `--device requested`: auto, cpu, cuda or cuda:K.

        `auto` and `cuda` take cuda:local_rank where several GPUs are visible and cuda:0 where one is (a scheduler that
        binds GPUs shows each rank its own as number 0). `auto` falls back to the CPU. Raises ConfigError.
        """
        import torch

        kind, _, index = requested.lower().partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
            raise ConfigError(f"--device: unknown device {requested!r}; choose auto, cpu, cuda or cuda:K")
        visible = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
        if kind == "cpu" or (kind == "auto" and visible == 0):
            return torch.device("cpu")
        chosen = int(index) if index else (self.local_rank % visible if visible > 1 else 0)
        if chosen >= visible:
            raise ConfigError(f"--device {requested}: rank {self.rank} on {self.host} sees {visible} CUDA devices")
        return torch.device("cuda", chosen)

    def threads_per_rank(self) -> int:
        """Return how many compute threads this rank may use: OMP_NUM_THREADS if set, else its share of the cores."""
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        if asked.isdecimal() and int(asked) > 0:
            return int(asked)
        return max(1, min(self.cores // self.local_size, len(os.sched_getaffinity(0))))


def announced_size(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Return (launcher, number of ranks) as the innermost launcher announced them, or None without a launcher.

    Where two MPI launchers are nested, nothing tells which is the inner one, so the smaller number counts: it
    never refuses a run that was started rightly.
    """
    words = [(name, _number(environment, size)) for name, size, _ in _LAUNCHERS]
    found = [(name, size) for name, size in words if size is not None]
    if found:
        return min(found, key=lambda word: word[1])
    steps = _number(environment, _SLURM[1])
    return None if steps is None else (_SLURM[0], steps)


def launcher_rank(environment: Mapping[str, str]) -> int:
    """Return the rank that the launcher announced, 0 without one: for what is said before MPI is up (`--help`)."""
    for _, size, rank in (*_LAUNCHERS, _SLURM):
        if _number(environment, size) is not None:
            return _number(environment, rank) or 0
    return 0


def discover(
    environment: Mapping[str, str] = os.environ, need_mpi: bool = False, timeout_seconds: float = 300.0
) -> Topology:
    """Find this process's place. All ranks must call, once, before any communicator is made.

    Initialises MPI where a launcher is at work or `need_mpi` asks for it; where not all ranks come to that in time, or
    to the end of MPI when they exit, this process ends. Raises ConfigError where MPI is needed and cannot be loaded,
    where the launcher started several ranks and MPI sees one, or where the environment chooses a network interface for
    MPI that cannot serve.
    """
    announced = announced_size(environment)
    if announced is None and not need_mpi:
        cores = len(os.sched_getaffinity(0))
        return Topology(cores=cores, host=socket.gethostname(), timeout_seconds=timeout_seconds)
    rank = launcher_rank(environment)
    with deadline(timeout_seconds, rank, f"rank {rank} on {socket.gethostname()}", "the start of MPI"):
        return _meet(announced, need_mpi, timeout_seconds)


def _meet(announced: tuple[str, int] | None, need_mpi: bool, timeout_seconds: float) -> Topology:
    """Start MPI, and find this process's place among the ranks."""
    host = socket.gethostname()
    cores = len(os.sched_getaffinity(0))
    # UCX, below MPICH, otherwise often sends large messages over TCP one way after the other, at half the rate.
    os.environ.setdefault("UCX_TCP_PUT_ENABLE", "n")
    wrong_interface = leave_out_wrong_choice(os.environ, announced[0] if announced else "none")
    try:
        with warnings.catch_warnings():
            # mpi4py too suspects a wrong launcher; what we say about it below is one line, and tells what to do.
            warnings.filterwarnings("ignore", "suspicious MPI execution environment")
            from mpi4py import MPI
    except (ImportError, RuntimeError) as problem:
        if not need_mpi and announced is not None and announced[1] == 1:
            return Topology(cores=cores, host=host, timeout_seconds=timeout_seconds)
        why = " ".join(str(problem).split())
        raise ConfigError(
            f"MPI cannot be loaded ({why}); install mpi4py and an MPI library, e.g. pip install mpi4py mpich"
        ) from problem
    world = MPI.COMM_WORLD
    launcher, size = announced or ("none", 1)
    if world.Get_size() == 1 and size > 1:
        library = " ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ").split())
        raise ConfigError(
            f"{launcher} started {size} ranks ({_variable(launcher)}={size}), but MPI ({library}) sees one: start with "
            f"the mpirun or mpiexec of that MPI library, or with srun's matching --mpi= type (pmi2 for MPICH, pmix for "
            f"Open MPI)"
        )
    node_comm = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.Get_rank())
    if node_comm.Get_rank() == 0:
        remove_abandoned(Path("/dev/shm"), Path("/proc"), time.time())
    _unlink_shared_memory(node_comm)
    leaders = world.allgather(node_comm.bcast(world.Get_rank(), root=0))
    nodes = sorted(set(leaders))
    # Launchers may bind each rank to one core, so the node's cores are the union over its ranks.
    available = set().union(*node_comm.allgather(os.sched_getaffinity(0)))
    topology = Topology(
        rank=world.Get_rank(),
        size=world.Get_size(),
        node=nodes.index(leaders[world.Get_rank()]),
        nodes=len(nodes),
        local_rank=node_comm.Get_rank(),
        local_size=node_comm.Get_size(),
        cores=len(available),
        host=host,
        launcher=launcher,
        world=world,
        timeout_seconds=timeout_seconds,
    )
    node_comm.Free()
    topology.agree(lambda: _refuse(wrong_interface))
    if topology.size > 1:
        deadline_of_exit(timeout_seconds, topology.rank, topology.describe())
    return topology


def _refuse(mistake: str | None) -> None:
    if mistake is not None:
        raise ConfigError(mistake)


def _unlink_shared_memory(node_comm: Any) -> None:
    """Take the names of MPICH's shared-memory files away once all ranks of the node have mapped them.

    A mapped file without a name lives as long as a process uses it, so a killed job leaves nothing in /dev/shm.
    """
    node_comm.Barrier()
    if node_comm.Get_rank() == 0 and Path("/proc/self/maps").exists():
        for line in Path("/proc/self/maps").read_text().splitlines():
            name = line.split(maxsplit=5)[-1]
            if name.startswith("/dev/shm/mpich_shm_"):
                Path(name).unlink(missing_ok=True)
    node_comm.Barrier()


def remove_abandoned(folder: Path, processes: Path, now_seconds: float) -> list[Path]:
    """Remove what MPI libraries left in `folder` (/dev/shm) when a job was killed, and return the files.

    Our own shared memory has no names (`comm/shared_memory.py`), and MPICH's lose theirs in `discover`; but a job
    killed before that, or killed under Open MPI, leaves its files. Those go that belong to this user, are older than a
    minute (a starting job has made its files, but not all its ranks have mapped them yet), and that no process maps.
    """
    try:
        found = [path for pattern in _MPI_FILES for path in folder.glob(pattern)]
        old = [path for path in found if _is_old_file_of_mine(path, now_seconds)]
        if not old:
            return []
        used: set[str] = set()
        for maps in processes.glob("[0-9]*/maps"):
            # Processes that end meanwhile, and other users', cannot be read; these do not map files of this user.
            with contextlib.suppress(OSError):
                used |= {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    except OSError:
        return []
    abandoned = [path for path in old if str(path) not in used]
    for path in abandoned:
        with contextlib.suppress(OSError):
            path.unlink()
    return abandoned


def _is_old_file_of_mine(path: Path, now_seconds: float) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and now_seconds - status.st_mtime > 60


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None


def _variable(launcher: str) -> str:
    return next(size for name, size, _ in (*_LAUNCHERS, _SLURM) if name == launcher)
