"""Setting samples aside for testing where a data set has no test split of its own.

The choice is the same in every run, whatever its seed, so that results on one data set compare.
"""

import torch
from torch import Tensor

from allreduce_sgd.data.split import Split

__all__ = ["hold_out"]

_SEED = 20_151


def hold_out(samples: Split, test_fraction: float) -> tuple[Split, Split]:
    """Divide `samples` into (train, test) at random, with about `test_fraction` of them in test.

    Where targets are labels (n,), each class is divided in this proportion (a stratified split). Samples keep their
    order within each part.
    """
    generator = torch.Generator().manual_seed(_SEED)
    targets = samples.targets
    stratified = targets.ndim == 1 and not targets.is_floating_point()
    groups = targets if stratified else torch.zeros(len(samples), dtype=torch.int64)
    in_test = torch.zeros(len(samples), dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        in_test[shuffled[: round(len(members) * test_fraction)]] = True
    return _select(samples, ~in_test), _select(samples, in_test)


def _select(samples: Split, mask: Tensor) -> Split:
    return Split(samples.inputs[mask], samples.targets[mask])
