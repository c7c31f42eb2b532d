"""Statistics of batch normalisation recomputed over the training data, each rank with its part of them.

What torch.optim.swa_utils.update_bn does on one process: the running statistics become the means of those of all
batches. The parts (those of the ranks, or of virtual ranks) are put together in their order, each by the number of its
batches. Bytes per rank: an all-gather of the statistics in float64 of all parts.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.random_state import random_state, restore_random_state, seed_generators

__all__ = ["recompute_statistics"]


@torch.no_grad()
def recompute_statistics(
    model: nn.Module, batches: Callable[[int, int], Iterable[Tensor]], comm: Communicator, seed: int, parts: int = 1
) -> None:
    """Replace the running statistics of all batch normalisations of `model`, the same on all ranks. All must call.

    Each rank has so many `parts`; `batches(part, of)` gives the inputs of one of them, on the model's device. Forward
    passes draw random numbers from `seed` and the part alone; the generators are left as they were.
    """
    tracking = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]
    if not tracking:
        return
    running = [one for layer in tracking for one in (layer.running_mean, layer.running_var) if one is not None]
    table = torch.zeros(comm.size * parts, 1 + sum(one.numel() for one in running), dtype=torch.float64)
    device = running[0].device
    before = random_state(device)
    try:
        for part in range(comm.rank * parts, (comm.rank + 1) * parts):
            seed_generators(seed, part)
            update_bn(batches(part, comm.size * parts), model)
            counted = [one.num_batches_tracked for one in tracking if one.num_batches_tracked is not None]
            table[part, 0] = float(counted[0]) if counted else 0.0
            table[part, 1:] = torch.cat([one.double().flatten().cpu() for one in running])
    finally:
        restore_random_state(before, device)
    comm.all_gather(table.view(-1)).wait()
    weights = table[:, :1] / table[:, 0].sum()
    means = (table[:, 1:] * weights).sum(0).split([one.numel() for one in running])
    for one, mean in zip(running, means, strict=True):
        one.copy_(mean.view(one.shape))
    for layer in tracking:
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(int(table[:, 0].sum()))
