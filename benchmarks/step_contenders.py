"""The field of `step_time`: the bare module, ours in its settings, ours with codecs, and torch's DDP over Gloo.

Ours in its settings, and torch's in its own, count with the fastest: choosing after the fact is in both's favour.

- ddp             DistributedDataParallel in a user's loop
- sharded         a ShardedOptimizer over it: each rank updates its part of the parameters (ZeRO stage 1)
- sharded-shared  likewise, and the ranks of the node have one memory for the parameters (one host only)

A codec makes a contender of its own, since what it computes is another thing. Beside those that torch has a hook for,
torch's DDP takes the step with that hook.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from allreduce_sgd.comm.base import Communicator, Traffic
from allreduce_sgd.compression.build import build_codec
from allreduce_sgd.compression.options import CODECS, CompressionOptions
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.gradients.sharded import ShardedOptimizer
from benchmarks.contenders import GRADIENT_TOLERANCE, OPTIMIZERS, Compressed, Contender, Sharded
from benchmarks.workloads import Workload

__all__ = [
    "ALONE",
    "BASELINE",
    "COMPRESSIONS",
    "OURS",
    "SETTINGS",
    "TORCH",
    "Plan",
    "bare_contender",
    "close_gloo",
    "contenders",
    "own_contender",
    "torch_contender",
]

ALONE = "alone"
BASELINE = "no_communication"
OURS = "allreduce_sgd"
TORCH = "torch_ddp_gloo"
SETTINGS = ("ddp", "sharded", "sharded-shared")
COMPRESSIONS = tuple(name for name in CODECS if name != "none")

_TORCH_BUCKETS_MB = (25, 5)
_ALL_MB = 1024
_REST_SECONDS = 0.2
_POWERSGD_RANK = 2
# What rounding to so many bits does to a gradient; the other codecs keep what they leave out, and nothing is lost.
_LOSSES = MappingProxyType({"fp16": 5e-3, "bf16": 1e-2, "int8": 0.2})


@dataclass(frozen=True)
class Plan:
    """Which contenders there are: settings of ours, codecs, and the name of the optimizer of all."""

    settings: Sequence[str]
    compressions: Sequence[str]
    optimizer: str
    hosts: int


def contenders(workload: Workload, comm: Communicator, plan: Plan) -> Iterator[Contender]:
    """Make all contenders, with a model each. All ranks must call; torch's default process group must be there.

    `alone` and `no_communication` are one module used by different sets of ranks.
    """
    bare = workload.build()
    yield bare_contender(ALONE, bare, plan.optimizer)
    yield bare_contender(BASELINE, bare, plan.optimizer)
    for setting in plan.settings:
        if setting != "sharded-shared" or plan.hosts == 1:
            yield own_contender(setting, workload, comm, plan.optimizer)
    for compression in plan.compressions:
        yield _compressed(compression, workload, comm, plan.optimizer)
    for bucket_mb in _TORCH_BUCKETS_MB:
        for static_graph in (False, True):
            yield torch_contender(bucket_mb, static_graph, workload, plan.optimizer)
    for compression in plan.compressions:
        yield from _torch_compressed(compression, workload, plan.optimizer)


def bare_contender(name: str, module: nn.Module, optimizer: str) -> Contender:
    """Return the module alone: nothing is sent, and nobody waits."""
    return Contender(name, "", module, module, Traffic(), optimizer)


def torch_contender(bucket_mb: int, static_graph: bool, workload: Workload, optimizer: str) -> Contender:
    """Return torch's DDP over its default process group. All ranks must call."""
    module = workload.build()
    replica = nn.parallel.DistributedDataParallel(
        module, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True, static_graph=static_graph
    )
    setting = f"bucket_cap_mb={bucket_mb}" + (" static_graph" if static_graph else "")
    return Contender(TORCH, setting, module, replica, None, optimizer)


def close_gloo(comm: Communicator) -> None:
    """Close the communicator of torch's default process group, and let its threads come to rest.

    torch's DDP keeps them alive, and one that drops its last tensor while the interpreter ends aborts the process.
    """
    comm.close()
    time.sleep(_REST_SECONDS)


def own_contender(setting: str, workload: Workload, comm: Communicator, optimizer: str) -> Contender:
    """Return ours in one of `SETTINGS`. All ranks must call."""
    module = workload.build()
    replica = DistributedDataParallel(module, comm)
    if setting == "ddp":
        return Contender(OURS, setting, module, replica, comm.traffic, optimizer)
    stepper = ShardedOptimizer(replica, OPTIMIZERS[optimizer], share_parameters=setting == "sharded-shared")
    return Sharded(OURS, setting, module, replica, comm.traffic, optimizer, stepper)


def _compressed(compression: str, workload: Workload, comm: Communicator, optimizer: str) -> Contender:
    module = workload.build()
    make = build_codec(CompressionOptions(compression), seed=0, rank=comm.rank, size=comm.size)
    replica = DistributedDataParallel(module, comm, compression=make)
    tolerance = _LOSSES.get(compression, GRADIENT_TOLERANCE)
    return Compressed(f"{OURS}_{compression}", "ddp", module, replica, comm, optimizer, tolerance)


def _torch_compressed(compression: str, workload: Workload, optimizer: str) -> Iterator[Contender]:
    module = workload.build()
    if compression == "fp16":
        replica = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
        replica.register_comm_hook(None, default_hooks.fp16_compress_hook)
        yield Contender(f"{TORCH}_fp16", "", module, replica, None, optimizer, tolerance=_LOSSES["fp16"])
    elif compression == "powersgd":
        # One bucket: over Gloo the hook's later phases of several buckets meet in another order on every rank.
        replica = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=_ALL_MB, gradient_as_bucket_view=True)
        # From the first step that it allows, so that all timed steps are compressed.
        state = powerSGD_hook.PowerSGDState(None, _POWERSGD_RANK, start_powerSGD_iter=2)
        replica.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        # What it keeps back cannot be seen, so that its gradient cannot be checked.
        yield Contender(f"{TORCH}_powersgd", "", module, replica, None, optimizer, tolerance=None)
