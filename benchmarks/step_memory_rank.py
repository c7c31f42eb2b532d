"""One rank of one measurement of `step_memory`, in a process of its own: rank 0 prints what it found as JSON.

`python -m benchmarks.step_memory_rank WORKLOAD CONTENDER SETTING STEPS`, on every rank; `step_memory` starts it. How
the figures come about, and what they are worth, is told there.
"""

import json
import resource
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.topology import Topology, discover
from benchmarks.contenders import Contender
from benchmarks.step_contenders import BASELINE, OURS, TORCH, bare_contender, close_gloo, own_contender, torch_contender
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["main"]

_OPTIMIZER = "sgd"
_WARMUP = 5
_TORCH_BUCKET_MB = 25
_RESET_PEAK = "5\n"


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and return the exit status. All ranks must call with the same arguments."""
    workload, name, setting, steps = WORKLOADS[arguments[0]], arguments[1], arguments[2], int(arguments[3])
    torch.set_num_threads(1)
    topology = discover()
    comm = _connected(topology, name)
    before_bytes = _resident_bytes("VmRSS")
    contender = _contender(workload, name, setting, comm)
    batch = workload.batch(topology.rank)
    contender.turn(batch, _WARMUP)
    topology.gather_all(None)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    faults = _page_faults()
    contender.turn(batch, steps)
    faults = _page_faults() - faults
    mine = {
        "before_bytes": before_bytes,
        "peak_bytes": _resident_bytes("VmHWM"),
        "page_faults_per_step": faults / steps,
    }
    # With Gloo's threads at work beside it, torch's profiler crashes now and then.
    if name != TORCH:
        allocated = _allocated_bytes(contender, batch, steps)
        mine["allocations_per_step"] = len(allocated) / steps
        mine["allocated_bytes_per_step"] = sum(allocated) / steps
    everyone = topology.gather_all(mine)
    if topology.rank == 0:
        result = {key: statistics.fmean(each[key] for each in everyone) for key in mine}
        result["gradient_bytes"] = sum(parameter.nbytes for parameter in contender.parameters)
        if isinstance(contender.replica, DistributedDataParallel):
            result["largest_bucket_bytes"] = max(contender.replica.bucket_bytes(), default=0)
        print(json.dumps(result), flush=True)
    if comm is not None:
        close_gloo(comm) if name == TORCH else comm.close()
    return 0


def _connected(topology: Topology, name: str) -> Communicator | None:
    """Return the communicator that the contender needs, after its first use, for which libraries may fetch memory."""
    if name == BASELINE:
        return None
    backend = ("mpi" if topology.size > 1 else "single") if name == OURS else "gloo"
    comm = connect(topology, torch.device("cpu"), CommunicationOptions(backend))
    comm.all_reduce(torch.ones(1)).wait()
    return comm


def _contender(workload: Workload, name: str, setting: str, comm: Communicator | None) -> Contender:
    if comm is None:
        return bare_contender(name, workload.build(), _OPTIMIZER)
    if name == OURS:
        return own_contender(setting, workload, comm, _OPTIMIZER)
    return torch_contender(_TORCH_BUCKET_MB, False, workload, _OPTIMIZER)


def _resident_bytes(which: str) -> float:
    """Return the resident memory, now (VmRSS) or at its peak (VmHWM), without files.

    What ranks share counts in equal parts. Files and shared memory have to be as they were at the peak.
    """
    status = _fields(Path("/proc/self/status"))
    shared_bytes = _fields(Path("/proc/self/smaps_rollup"))["Pss_Shmem"]
    return status[which] - status["RssFile"] - status["RssShmem"] + shared_bytes


def _fields(path: Path) -> dict[str, int]:
    """Return the entries in kB, in bytes."""
    words = (line.split() for line in path.read_text().splitlines())
    return {entry[0].rstrip(":"): 1024 * int(entry[1]) for entry in words if len(entry) == 3 and entry[2] == "kB"}


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _allocated_bytes(contender: Contender, batch: tuple[torch.Tensor, torch.Tensor], steps: int) -> list[int]:
    """Return the size of every tensor that the training thread allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender.turn(batch, steps)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
