"""The digits of scikit-learn: 1,797 grey images of 8x8 pixels in 10 classes, part of the installed package.

The test part of Kaynak's data set (UCI "Optical Recognition of Handwritten Digits", 1998).
"""

import torch

from allreduce_sgd.data.holdout import hold_out
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split

__all__ = ["load_digits"]

_CLASSES = 10
_LARGEST_PIXEL = 16


def load_digits(options: DataOptions) -> Dataset:
    """`digits`: inputs (n, 1, 8, 8) float32 in [0, 1], targets (n,) int64; a fixed stratified split."""
    # Not at the top: scikit-learn takes a second to import, and only this data set needs it.
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    inputs = torch.from_numpy(images).float().div_(_LARGEST_PIXEL).reshape(-1, 1, 8, 8)
    train, test = hold_out(Split(inputs, torch.from_numpy(labels).long()), options.test_fraction)
    return Dataset("digits", train, test, (1, 8, 8), _CLASSES)
