"""allreduce_sgd: an MPI-first data-parallel trainer for PyTorch.

The public names, loaded when they are first used, so that importing the package loads neither torch nor MPI.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allreduce_sgd.comm.base import Communicator, ReduceOp, Work
    from allreduce_sgd.gradients.ddp import DistributedDataParallel
    from allreduce_sgd.gradients.sharded import ShardedOptimizer
    from allreduce_sgd.gradients.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm
    from allreduce_sgd.start import connect
    from allreduce_sgd.strategies.base import Strategy
    from allreduce_sgd.topology import Topology, discover
    from allreduce_sgd.trainer import Trainer

__all__ = [
    "Communicator",
    "DistributedDataParallel",
    "ReduceOp",
    "ShardedOptimizer",
    "Strategy",
    "SyncBatchNorm",
    "Topology",
    "Trainer",
    "Work",
    "connect",
    "convert_sync_batchnorm",
    "discover",
]

_HOMES = {
    "Communicator": "comm.base",
    "DistributedDataParallel": "gradients.ddp",
    "ReduceOp": "comm.base",
    "ShardedOptimizer": "gradients.sharded",
    "Strategy": "strategies.base",
    "SyncBatchNorm": "gradients.sync_batch_norm",
    "Topology": "topology",
    "Trainer": "trainer",
    "Work": "comm.base",
    "connect": "start",
    "convert_sync_batchnorm": "gradients.sync_batch_norm",
    "discover": "topology",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
