"""The diabetes data of Efron, Hastie, Johnstone and Tibshirani 2004 ("Least Angle Regression"), part of scikit-learn.

442 patients with ten features each (age, sex, body mass index, blood pressure, six serum measurements); the target is
how far the disease has come a year later, 25 to 346.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from allreduce_sgd.data.holdout import hold_out
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split

__all__ = ["load_diabetes"]

_FEATURES = 10


def load_diabetes(options: DataOptions) -> Dataset:
    """`diabetes`: inputs (n, 10) float32 as scikit-learn scales them, targets (n,) float32; a fixed split."""
    table = _table()
    # Centred, and of length one over all patients.
    inputs = table[:, :_FEATURES] - table[:, :_FEATURES].mean(0)
    inputs /= np.linalg.norm(inputs, axis=0)
    samples = Split(torch.from_numpy(inputs).float(), torch.from_numpy(table[:, _FEATURES]).float())
    train, test = hold_out(samples, options.test_fraction)
    return Dataset("diabetes", train, test, (_FEATURES,), None)


def _table() -> NDArray[np.float64]:
    """A row per patient: the features as they were measured, then the target."""
    # As for the digits, its files are read without importing scikit-learn wherever they can be found.
    package = importlib.util.find_spec("sklearn")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent / "datasets" / "data"
        paths = [folder / "diabetes_data_raw.csv.gz", folder / "diabetes_target.csv.gz"]
        if all(path.is_file() for path in paths):
            return np.column_stack([np.loadtxt(path) for path in paths])
    from sklearn import datasets

    return np.column_stack(datasets.load_diabetes(return_X_y=True, scaled=False))
