"""What every batch of samples must satisfy before a model sees it.

Training on NaN, or on a label outside the classes, otherwise shows much later, as a diverged loss or as a failed
assertion inside a kernel, so the first bad sample is named here.
"""

import torch
from torch import Tensor

from allreduce_sgd.errors import ConfigError

__all__ = ["check_samples"]


def _first_not_finite(values: Tensor) -> int | None:
    if not values.is_floating_point() or bool(torch.isfinite(values.sum())):
        # NaN and Inf survive a sum, so one pass without a mask as large as the data clears nearly every data set.
        return None
    bad = (~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero()
    return int(bad[0]) if len(bad) else None


def check_samples(
    where: str,
    inputs: Tensor,
    targets: Tensor,
    classes: int | None,
    names: Tensor | None = None,
    ignore_index: int | None = None,
) -> None:
    """Check n samples: `inputs` (n, ...), `targets` (n, ...) integer if `classes` is given, else floating.

    `where` names data set and split in the error texts; `names` (n,) holds the samples' indices where these are
    not simply 0..n-1; `ignore_index` is a target that is allowed beside the classes.

    Raises:
        ConfigError: there are none, lengths differ, a value is NaN or Inf, or a target is of the wrong type or outside
            the classes.
    """

    def index(position: int) -> int:
        return position if names is None else int(names[position])

    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        raise ConfigError(f"{where}: inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} differ in length")
    if len(inputs) == 0:
        raise ConfigError(f"{where}: the split is empty; at least one sample is needed")
    for role, values in (("inputs", inputs), ("targets", targets)):
        position = _first_not_finite(values)
        if position is not None:
            raise ConfigError(f"{where}: sample {index(position)} has NaN or Inf in its {role}; all must be finite")
    if classes is None:
        if not targets.is_floating_point():
            raise ConfigError(f"{where}: targets are {targets.dtype}; a regression needs floating targets")
        return
    if targets.is_floating_point():
        raise ConfigError(f"{where}: targets are {targets.dtype}; {classes} classes need integer targets")

    def outside(values: Tensor) -> Tensor:
        wrong = (values < 0) | (values >= classes)
        return wrong if ignore_index is None else wrong & (values != ignore_index)

    bad = outside(targets).reshape(len(targets), -1).any(1).nonzero()
    if len(bad):
        position = int(bad[0])
        values = targets[position].reshape(-1)
        value = int(values[outside(values)][0])
        ignored = "" if ignore_index is None else f" and {ignore_index}, which is ignored"
        raise ConfigError(
            f"{where}: sample {index(position)} has target {value}; allowed are 0..{classes - 1}{ignored}"
        )
