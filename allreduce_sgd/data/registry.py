"""Which name means which data set."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from allreduce_sgd.data.cifar10 import load_cifar10
from allreduce_sgd.data.digits import load_digits
from allreduce_sgd.data.holdout import hold_out_validation
from allreduce_sgd.data.idx import load_idx_images
from allreduce_sgd.data.npz import load_npz
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.sparse import DEFAULT_SPARSE_SPECIFICATION, load_synthetic_sparse
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.data.standardize import standardized
from allreduce_sgd.data.synthetic import DEFAULT_SPECIFICATION, load_synthetic
from allreduce_sgd.data.text import load_text
from allreduce_sgd.data.user import load_user
from allreduce_sgd.errors import ConfigError

__all__ = ["load_dataset"]

_IMAGE_SETS: Mapping[str, Callable[[DataOptions], Dataset]] = MappingProxyType(
    {
        "digits": load_digits,
        "mnist": load_idx_images,
        "fashion-mnist": load_idx_images,
        "cifar10": load_cifar10,
    }
)
_CHOICES = (
    *_IMAGE_SETS,
    "synthetic[:SAMPLES,SHAPE,CLASSES]",
    "synthetic-sparse[:SAMPLES,FEATURES,CLASSES]",
    "npz:FILE",
    "text:FILE",
    "module:function",
)


def load_dataset(options: DataOptions, seed: int) -> Dataset:
    """Load, check and, if asked for, divide and standardise the data set `options.dataset`; downloads nothing.

    `seed` is the run's; only synthetic data depend on it. Every rank that calls this gets the same data.

    Raises:
        ConfigError: the name is unknown, files are missing or damaged, or samples are unfit for training.
    """
    dataset = _load(options, seed)
    if options.validation_fraction is not None:
        dataset = hold_out_validation(dataset, options.validation_fraction)
    default = options.dataset.lower() in _IMAGE_SETS
    wanted = default if options.standardize is None else options.standardize
    return standardized(dataset) if wanted else dataset


def _load(options: DataOptions, seed: int) -> Dataset:
    name = options.dataset.lower()
    if name in _IMAGE_SETS:
        return _IMAGE_SETS[name](options)
    prefix, separator, rest = options.dataset.partition(":")
    match prefix.lower():
        case "synthetic":
            return load_synthetic(options, rest if separator else DEFAULT_SPECIFICATION, seed)
        case "synthetic-sparse":
            return load_synthetic_sparse(options, rest if separator else DEFAULT_SPARSE_SPECIFICATION, seed)
        case "npz" if separator:
            return load_npz(options, rest)
        case "text" if separator:
            return load_text(options, rest)
    if separator:
        return load_user(options)
    raise ConfigError(f"--dataset {options.dataset}: unknown; allowed are {', '.join(_CHOICES)}")
