"""The digits of scikit-learn: 1,797 grey images of 8x8 pixels in 10 classes, part of the installed package.

The test part of Kaynak's data set (UCI "Optical Recognition of Handwritten Digits", 1998).
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from allreduce_sgd.data.holdout import hold_out
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split

__all__ = ["load_digits"]

_CLASSES = 10
_LARGEST_PIXEL = 16


def load_digits(options: DataOptions) -> Dataset:
    """`digits`: inputs (n, 1, 8, 8) float32 in [0, 1], targets (n,) int64; a fixed stratified split."""
    table = torch.from_numpy(_table())
    inputs = table[:, :-1].float().div_(_LARGEST_PIXEL).reshape(-1, 1, 8, 8)
    train, test = hold_out(Split(inputs, table[:, -1].long()), options.test_fraction)
    return Dataset("digits", train, test, (1, 8, 8), _CLASSES)


def _table() -> NDArray[np.float64]:
    """A row per image: its 64 pixels, then its class."""
    # Importing scikit-learn takes as long as importing torch, so its file is read without it wherever it can be found.
    package = importlib.util.find_spec("sklearn")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            table: NDArray[np.float64] = np.loadtxt(path, delimiter=",")
            return table
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    return np.column_stack([images, labels])
