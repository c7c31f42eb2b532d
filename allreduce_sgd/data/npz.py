"""Data sets in a NumPy archive: `npz:FILE`.

The arrays are called `train_inputs, train_targets, test_inputs, test_targets`, or `x_train, y_train, x_test, y_test`
as in Keras, or `inputs, targets`, from which a test split is then taken. Inputs of bytes are images and become
[0, 1]; integer inputs are tokens where the targets are integers of the same shape, else numbers. Integer targets are
labels, floating targets a regression. Pickled objects are never loaded.
"""

from pathlib import Path

import numpy as np

from allreduce_sgd.data.arrays import class_count, split_of
from allreduce_sgd.data.files import named_file
from allreduce_sgd.data.holdout import hold_out
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError, quoted
from allreduce_sgd.user_code import refusing

__all__ = ["load_npz"]

_NAMES = (
    ("train_inputs", "train_targets", "test_inputs", "test_targets"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("inputs", "targets"),
)
_MOST_NAMED = 12


def load_npz(options: DataOptions, name: str) -> Dataset:
    """The data set in the archive `name`: inputs (n, ...) float32 or int64, targets (n, ...) int64 or float32.

    Raises:
        ConfigError: the file is missing or damaged, lacks arrays, or they do not fit together.
    """
    path = named_file(options, name)
    arrays = _read(path)
    splits = [_split(arrays[0], arrays[1], f"{path}: train")]
    if len(arrays) == 4:
        splits.append(_split(arrays[2], arrays[3], f"{path}: test"))
    classes = class_count(tuple(split.targets for split in splits), str(path), options.ignore_index)
    train, test = splits if len(splits) == 2 else hold_out(splits[0], options.test_fraction)
    shape = tuple(train.inputs.shape[1:])
    return Dataset(f"npz:{name}", train, test, shape, classes, ignore_index=options.ignore_index)


def _read(path: Path) -> list[np.ndarray]:
    with refusing(f"{path}: is no readable .npz archive"):
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("expected several named arrays, as numpy.savez writes them")
        with archive:
            for names in _NAMES:
                if all(name in archive.files for name in names):
                    return [_array(archive, name) for name in names]
            # A damaged archive may name an array with a line break, or many of them.
            found = ", ".join(map(quoted, archive.files[:_MOST_NAMED])) or "none"
    wanted = " or ".join(", ".join(names) for names in _NAMES)
    raise ConfigError(f"{path}: its arrays are {found}; expected {wanted}")


def _array(archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    array = archive[name]
    if not isinstance(array, np.ndarray):
        # NumPy returns what is no array as bytes.
        raise ValueError(f"{name} is no array")
    if 0 in array.shape[1:]:
        raise ValueError(f"{name} has the shape {array.shape}; every sample needs a number")
    return array


def _split(inputs: np.ndarray, targets: np.ndarray, where: str) -> Split:
    tokens = inputs.dtype.kind in "iu" and targets.dtype.kind in "iu" and inputs.shape == targets.shape
    if tokens:
        inputs = inputs.astype(np.int64)
    elif inputs.dtype.kind == "i" or (inputs.dtype.kind == "u" and inputs.dtype.itemsize > 1):
        inputs = inputs.astype(np.float32)
    split = split_of(inputs, targets, where)
    if len(split.inputs) != len(split.targets):
        raise ConfigError(f"{where}: {len(split.inputs)} inputs, but {len(split.targets)} targets")
    return split
