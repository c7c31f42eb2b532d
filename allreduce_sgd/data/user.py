"""Data sets made by a function of the user's own: `--dataset module:function`.

The function is called with `data_dir` (a string or None) if it names it, and returns (train, test). Each is a pair
(inputs, targets) of tensors or numpy arrays, or a torch map-style data set of such pairs.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from allreduce_sgd.data.arrays import class_count, split_of
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, MapSplit, MapStyle, Samples, Split
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import call_with_named, load_function, refusing

__all__ = ["load_user"]

_EXPECTED = (
    "expected (train, test), each a pair (inputs, targets) of tensors or numpy arrays, or a torch map-style data set"
)


def load_user(options: DataOptions) -> Dataset:
    """The data set that the function named by `--dataset` returns.

    Integer targets are labels. Their number of classes is the largest label plus one; of a map-style data set it is
    the length of its `classes` if it has them, as those of torchvision do, else all its samples are visited once.

    Raises:
        ConfigError: the function cannot be imported, raises, or returns something else.
    """
    what = f"--dataset {options.dataset}"
    function = load_function(options.dataset, "--dataset")
    result = call_with_named(function, {"data_dir": options.data_dir}, what)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ConfigError(f"{what}: the function returned {_form(result)}; {_EXPECTED}")
    parts = [(_where(options, part), value) for part, value in zip(("train", "test"), result, strict=True)]
    pairs = [
        split_of(value[0], value[1], where) if _is_pair(value) else _map_style(value, what) for where, value in parts
    ]
    classes = _classes(pairs, what, options.ignore_index)
    train, test = (
        pair if isinstance(pair, Split) else MapSplit(where, pair, classes, options.ignore_index)
        for (where, _), pair in zip(parts, pairs, strict=True)
    )
    return Dataset(options.dataset, train, test, _input_shape(train), classes, ignore_index=options.ignore_index)


def _where(options: DataOptions, part: str) -> str:
    return f"data set {options.dataset}, {part} split"


def _form(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(entry, (Tensor, np.ndarray)) for entry in value)
    )


def _map_style(value: Any, what: str) -> MapStyle:
    if isinstance(value, (tuple, list, Tensor, np.ndarray, dict, str)) or not (
        hasattr(value, "__len__") and hasattr(value, "__getitem__")
    ):
        raise ConfigError(f"{what}: the function returned {_form(value)} as a split; {_EXPECTED}")
    samples: MapStyle = value
    return samples


def _classes(parts: list[Split | MapStyle], what: str, ignore_index: int | None) -> int | None:
    for part in parts:
        names = getattr(part, "classes", None)
        if isinstance(names, (list, tuple)) and len(names) >= 2:
            return len(names)
    targets = tuple(part.targets if isinstance(part, Split) else _all_targets(part, what) for part in parts)
    return class_count(targets, what, ignore_index)


def _all_targets(samples: MapStyle, what: str) -> Tensor:
    known = getattr(samples, "targets", None)
    with refusing(f"{what}: reading the targets of a split raised"):
        values = known if known is not None else [samples[index][1] for index in range(len(samples))]
        if isinstance(values, list) and values and isinstance(values[0], Tensor):
            return torch.stack(values)
        return torch.as_tensor(values)


def _input_shape(samples: Samples) -> tuple[int, ...]:
    return tuple(samples.batch(torch.empty(0, dtype=torch.int64))[0].shape[1:])
