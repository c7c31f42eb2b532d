"""How arrays of any number type become the few tensor types that training computes with."""

import numpy as np
import torch
from torch import Tensor

from allreduce_sgd.data.split import Split
from allreduce_sgd.errors import ConfigError

__all__ = ["Array", "class_count", "input_tensor", "split_of", "target_tensor"]

Array = np.ndarray | Tensor

_FEWEST_CLASSES_TO_DOUBT = 1000


def _tensor(values: Array, where: str) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.detach()
    elif values.dtype.kind in "biuf":
        if values.dtype.kind == "u" and values.dtype.itemsize > 1:
            # torch can hardly compute with wider unsigned integers; one that int64 cannot hold shows as negative.
            values = values.astype(np.int64)
        elif values.dtype.kind == "f" and values.dtype.itemsize > 8:
            values = values.astype(np.float64)
        # A copy, native and contiguous: torch refuses other byte orders and warns of read-only memory.
        tensor = torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
    else:
        raise ConfigError(f"{where}: the array has dtype {values.dtype}; allowed are integers and floating numbers")
    if tensor.ndim == 0:
        raise ConfigError(f"{where}: a single number; expected an array with one entry per sample")
    if tensor.is_complex():
        raise ConfigError(f"{where}: the array has dtype {tensor.dtype}; allowed are integers and floating numbers")
    return tensor


def input_tensor(values: Array, where: str) -> Tensor:
    """Inputs (n, ...): bytes as float32 in [0, 1] as for images, other floating types as float32, integers as int64.

    Raises:
        ConfigError: the type is not a number; `where` starts the text.
    """
    tensor = _tensor(values, where)
    if tensor.dtype == torch.uint8:
        return tensor.float().div_(255)
    return tensor.float() if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor.long()


def target_tensor(values: Array, where: str) -> Tensor:
    """Targets (n, ...): integers (labels) as int64, a column (n, 1) of them as (n,), floating types as float32.

    Raises:
        ConfigError: the type is not a number; `where` starts the text.
    """
    tensor = _tensor(values, where)
    if tensor.is_floating_point():
        return tensor.float()
    return tensor.long().squeeze(1) if tensor.ndim == 2 and tensor.shape[1] == 1 else tensor.long()


def split_of(inputs: Array, targets: Array, where: str) -> Split:
    """Both arrays as a split, so far unchecked.

    Raises:
        ConfigError: a type is not a number; `where` starts the text.
    """
    return Split(input_tensor(inputs, f"{where} inputs"), target_tensor(targets, f"{where} targets"))


def class_count(targets: tuple[Tensor, ...], where: str, ignore_index: int | None = None) -> int | None:
    """The number of classes of integer `targets`, their largest plus one, at least 2; None if any is floating.

    Those that are `ignore_index` do not make it larger.

    Raises:
        ConfigError: so many that the integers can hardly be labels; `where` starts the text.
    """
    if any(part.is_floating_point() for part in targets):
        return None
    labels = [part if ignore_index is None else part[part != ignore_index] for part in targets]
    classes = 1 + max((int(part.max()) for part in labels if part.numel()), default=0)
    entries = sum(part.numel() for part in targets)
    if classes > max(entries, _FEWEST_CLASSES_TO_DOUBT):
        raise ConfigError(
            f"{where}: integer targets are labels 0..classes-1, but here reach {classes - 1} in only {entries} "
            "entries; make them floating for a regression"
        )
    return max(classes, 2)
