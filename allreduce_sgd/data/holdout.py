"""Setting samples aside for testing where a data set has no test split of its own.

The choice is the same in every run, whatever its seed, so that results on one data set compare.
"""

import torch
from torch import Tensor

from allreduce_sgd.data.split import Split

__all__ = ["held_out", "hold_out"]

_SEED = 20_151


def hold_out(samples: Split, test_fraction: float) -> tuple[Split, Split]:
    """Divide `samples` into (train, test) at random, as `held_out` says. Samples keep their order within each part."""
    in_test = held_out(samples.targets, test_fraction)
    return _select(samples, ~in_test), _select(samples, in_test)


def held_out(targets: Tensor, test_fraction: float) -> Tensor:
    """Which samples are for testing, about `test_fraction` of them, chosen at random: (n,) bool.

    Where targets are labels (n,), each class is divided in this proportion (a stratified split).
    """
    generator = torch.Generator().manual_seed(_SEED)
    stratified = targets.ndim == 1 and not targets.is_floating_point()
    groups = targets if stratified else torch.zeros(len(targets), dtype=torch.int64)
    in_test = torch.zeros(len(targets), dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        in_test[shuffled[: round(len(members) * test_fraction)]] = True
    return in_test


def _select(samples: Split, mask: Tensor) -> Split:
    return Split(samples.inputs[mask], samples.targets[mask])
