"""A SLURM cluster of several nodes on this machine, for as long as a `with` block lasts.

All state is under one new folder, all ports are free ones, so several clusters can run at once, next to a real one.
The daemons are children of this process, and die with it even if it is killed. Needs root and Debian's packages
slurm-wlm and munge (and libpmix-dev for `srun --mpi=pmix`: SLURM's plugin loads a libpmix.so without number). Nodes do
not have the host's name, so that Open MPI, to which PMIx tells theirs, then takes each rank to be on one of its own.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

__all__ = ["Job", "SlurmCluster"]

_START_SECONDS = 90.0
_STOP_SECONDS = 10.0
_COMMAND_SECONDS = 60.0
_JOB_SECONDS = 240.0
_GRACE_SECONDS = 60
_FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmctldPort={controller_port}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
ReturnToService=2
TmpFS={root}/tmp-%n
KillWait=5
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
"""
# A job of the second takes the cores from those of the first, which are told so many seconds before they are killed.
_PARTITIONS = """\
PartitionName=test Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Job:
    """A finished job: its number, SLURM's word for how it ended, its exit status and all that it wrote.

    Of an array job, a task K is "NUMBER_K".
    """

    number: int | str
    state: str
    exit_status: int
    output: str


class SlurmCluster:
    """Start munged, slurmctld and a slurmd for each node; stop them, and all that their jobs left running, at the end.

    Jobs go to the partition "test"; those of the partition "urgent" pre-empt them. `parameters` are those of the
    controller (SlurmctldParameters). `environment` holds what a process needs to talk to the cluster.
    """

    def __init__(self, nodes: int = 2, cpus: int = 2, parameters: Sequence[str] = ()) -> None:
        self.nodes = nodes
        self.cpus = cpus
        self.parameters = parameters
        self.environment: dict[str, str] = {}
        self._root = Path()
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        # Sockets' paths must be short, which pytest's own folders are not.
        self._root = Path(tempfile.mkdtemp(prefix="slurm-"))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def command(self, *words: str, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
        """Run one of SLURM's commands and return what it printed; RuntimeError with its words if it fails."""
        done = subprocess.run(
            words,
            env={**(os.environ if environment is None else environment), **self.environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def submit(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Call `sbatch arguments` in `folder`, where the output goes to job-NUMBER.out, and return the number.

        That of task K of an array job goes to job-NUMBER_K.out.
        """
        array = any(word.startswith("--array") for word in arguments)
        words = ("sbatch", "--parsable", f"--output={folder}/job-{'%A_%a' if array else '%j'}.out", *arguments)
        return int(self.command(*words, environment=environment, folder=folder))

    def wait(self, job: int | str, folder: Path, seconds: float = _JOB_SECONDS) -> Job:
        """Wait until the job has ended. After `seconds` cancel it and raise TimeoutError with its output."""
        if not _poll(lambda: self._record(job)["JobState"] in _FINISHED, seconds):
            told = self._told(job, folder)
            self.command("scancel", str(job))
            raise TimeoutError(f"not at its end after {seconds} s: {told}")
        fields = self._record(job)
        return Job(job, fields["JobState"], int(fields["ExitCode"].split(":")[0]), self._output(job, folder))

    def watch(self, job: int | str, folder: Path, ready: Callable[[str], bool], seconds: float = _JOB_SECONDS) -> None:
        """Wait until `ready` says yes to what the job has written so far, while it runs for the first time.

        Raises RuntimeError, with the job's state and output, if it ends or is requeued before; TimeoutError after
        `seconds`, and cancels it.
        """

        def over() -> bool:
            record = self._record(job)
            return record["JobState"] in _FINISHED or record["Restarts"] != "0"

        if not _poll(lambda: ready(self._output(job, folder)) or over(), seconds):
            told = self._told(job, folder)
            self.command("scancel", str(job))
            raise TimeoutError(f"not so far after {seconds} s: {told}")
        if not ready(self._output(job, folder)):
            raise RuntimeError(f"it did not come so far: {self._told(job, folder)}")

    def _record(self, job: int | str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.command("scontrol", "show", "job", str(job))))

    @staticmethod
    def _output(job: int | str, folder: Path) -> str:
        return _read(folder / f"job-{job}.out")

    def _told(self, job: int | str, folder: Path) -> str:
        record = self._record(job)
        state = f"job {job} is {record['JobState']} ({record['Reason']}), requeued {record['Restarts']} times"
        log = [line for line in _read(self._root / "slurmctld.log").splitlines() if f"JobId={job}" in line]
        return "\n".join([f"{state}, and has written:", self._output(job, folder), "slurmctld.log:", *log])

    def run(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        seconds: float = _JOB_SECONDS,
    ) -> Job:
        """Submit a job and wait for its end."""
        return self.wait(self.submit(arguments, folder=folder, environment=environment), folder, seconds)

    def _start(self) -> None:
        root, host = self._root, socket.gethostname().split(".")[0]
        # munged refuses folders that others may write to, and jobs of other users must pass through.
        root.chmod(0o755)
        (root / "state").mkdir()
        key = root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

        ports = _free_ports(self.nodes + 1)
        names = [f"n{number}" for number in range(1, self.nodes + 1)]
        lines = [_CONFIGURATION.format(host=host, root=root, controller_port=ports[0])]
        for name, port in zip(names, ports[1:], strict=True):
            # PMIx keeps sockets there, which on real nodes do not meet.
            (root / f"tmp-{name}").mkdir()
            lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus}\n")
        lines.append(_PARTITIONS.format(nodes=",".join(names), grace=_GRACE_SECONDS))
        if self.parameters:
            lines.append(f"SlurmctldParameters={','.join(self.parameters)}\n")
        configuration = root / "slurm.conf"
        configuration.write_text("".join(lines))
        self.environment = {"SLURM_CONF": str(configuration)}

        self._log = (root / "daemons.log").open("wb")
        munge_socket = root / "munge.socket"
        # Settings of the machine's own munge service, such as its socket, must not meet ours.
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge_socket}",
            f"--pid-file={root}/munged.pid", f"--log-file={root}/munged.log", f"--seed-file={root}/munged.seed",
            "--num-threads=2",
        )  # fmt: skip
        self._wait_for("munged", munge_socket.exists)
        self._daemon("slurmctld", "-D", "-c")
        for name in names:
            self._daemon("slurmd", "-D", "-N", name)
        self._wait_for("the nodes", lambda: self._idle_nodes() == self.nodes)

    def _daemon(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if path is None:
            raise FileNotFoundError(program)
        # setpriv: a killed test run leaves no daemons behind.
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", path, *arguments],
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self._root,
        )
        self._daemons.append(daemon)

    def _idle_nodes(self) -> int:
        try:
            return len(self.command("sinfo", "-h", "-N", "-p", "test", "-t", "idle", "-o", "%N").split())
        except (RuntimeError, subprocess.TimeoutExpired):
            return 0

    def _wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        def ready_or_dead() -> bool:
            return ready() or any(daemon.poll() is not None for daemon in self._daemons)

        if not _poll(ready_or_dead, _START_SECONDS) or not ready():
            logs = "\n".join(f"{path.name}: {_read(path)[-1000:]}" for path in sorted(self._root.glob("*.log")))
            raise RuntimeError(f"{what} did not come up within {_START_SECONDS} s\n{logs}")

    def _stop(self) -> None:
        if self.environment and self._daemons:
            with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                self.command("scancel", "--user=root")
                _poll(lambda: not self.command("squeue", "-h").strip(), _STOP_SECONDS)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_leftovers()
        if self._log is not None:
            self._log.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def _kill_leftovers(self) -> None:
        """Kill job steps that outlived their daemon: everything started for a job has our SLURM_CONF."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment.get("SLURM_CONF", ""):
                    process.send_signal(signal.SIGKILL)


def _poll(ready: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on. All are held until the last is found, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
