"""Setting samples aside: for testing where a data set has no test split of its own, and for validation.

The choice is the same in every run, whatever its seed, so that results on one data set compare.
"""

from dataclasses import replace

import torch
from torch import Tensor

from allreduce_sgd.data.split import Dataset, Split, selected
from allreduce_sgd.errors import ConfigError, counted

__all__ = ["held_out", "hold_out", "hold_out_validation"]

_SEED = 20_151
_VALIDATION_SEED = 20_152


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


def hold_out_validation(dataset: Dataset, fraction: float) -> Dataset:
    """`dataset` with this share of its training samples, rounded, as its validation split instead.

    They are drawn at random; of a text, whose samples follow one another, they are the last ones. Samples keep their
    order within each part. Those that are in memory are copied, others are still made when they are asked for.

    Raises:
        ConfigError: either part would be empty.
    """
    samples = len(dataset.train)
    held = round(samples * fraction)
    if not 0 < held < samples:
        raise ConfigError(
            f"--validation-fraction {fraction:g}: of the {counted(samples, 'training sample')} of {dataset.name} it "
            f"holds out {held}; at least one must be held out, and one left"
        )
    order = torch.arange(samples)
    if dataset.vocabulary is None:
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(_VALIDATION_SEED))
    kept, held_out = (part.sort().values for part in (order[: samples - held], order[samples - held :]))
    return replace(dataset, train=selected(dataset.train, kept), validation=selected(dataset.train, held_out))


def _select(samples: Split, mask: Tensor) -> Split:
    return Split(samples.inputs[mask], samples.targets[mask])
