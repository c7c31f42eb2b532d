"""Which name means which data set."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from allreduce_sgd.data.augment import Augmentation, parse_augmentation
from allreduce_sgd.data.cifar10 import load_cifar10
from allreduce_sgd.data.csv_file import load_csv
from allreduce_sgd.data.diabetes import load_diabetes
from allreduce_sgd.data.digits import load_digits
from allreduce_sgd.data.holdout import hold_out_validation
from allreduce_sgd.data.housing import DEFAULT_HOUSES, load_housing
from allreduce_sgd.data.idx import load_idx_images
from allreduce_sgd.data.npz import load_npz
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.sparse import DEFAULT_SPARSE_SPECIFICATION, load_synthetic_sparse
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.data.standardize import standardized, standardized_targets
from allreduce_sgd.data.synthetic import DEFAULT_SPECIFICATION, load_synthetic
from allreduce_sgd.data.text import load_text
from allreduce_sgd.data.text_folder import load_text_folder
from allreduce_sgd.data.train_samples import with_train_samples
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
_DIABETES = "diabetes"
_HOUSING = "synthetic-housing"
_CHOICES = (
    *_IMAGE_SETS,
    _DIABETES,
    f"{_HOUSING}[:SAMPLES]",
    "synthetic[:SAMPLES,SHAPE,CLASSES]",
    "synthetic-sparse[:SAMPLES,FEATURES,CLASSES]",
    "npz:FILE",
    "csv:FILE",
    "text:FILE",
    "text-folder:DIR",
    "module:function",
)


def load_dataset(options: DataOptions, seed: int) -> Dataset:
    """Load, check and, if asked for, divide and standardise the data set `options.dataset`; downloads nothing.

    `seed` is the run's; only synthetic data and augmentation depend on it. Every rank that calls this gets the same
    data.

    Raises:
        ConfigError: the name is unknown, files are missing or damaged, or samples are unfit for training.
    """
    names = None if options.augment is None else parse_augmentation(options.augment)
    dataset = _load(options, seed)
    if options.validation_fraction is not None:
        dataset = hold_out_validation(dataset, options.validation_fraction)
    kind = options.dataset.lower().partition(":")[0]
    default = kind in (*_IMAGE_SETS, _DIABETES, _HOUSING)
    if default if options.standardize is None else options.standardize:
        dataset = standardized(dataset)
        if kind in (_DIABETES, _HOUSING):
            dataset = standardized_targets(dataset)
    if options.ignore_index is not None and dataset.classes is None:
        raise ConfigError(f"--ignore-index {options.ignore_index}: --dataset {dataset.name} is a regression")
    if options.ignore_index is not None:
        dataset = replace(dataset, ignore_index=options.ignore_index)
    return dataset if names is None else _augmented(dataset, options.augment, names, seed)


def _augmented(dataset: Dataset, text: str | None, names: tuple[str, ...], seed: int) -> Dataset:
    shape = dataset.input_shape
    if dataset.kind != "features" or len(shape) != 3:
        raise ConfigError(
            f"--augment {text}: it needs images (channels, height, width), but --dataset {dataset.name} gives "
            f"{dataset.kind} of the shape {shape}"
        )
    return replace(dataset, augmentation=Augmentation(names, shape, seed))


def _load(options: DataOptions, seed: int) -> Dataset:
    dataset = _load_whole(options, seed)
    return dataset if options.train_samples is None else with_train_samples(dataset, options.train_samples)


def _load_whole(options: DataOptions, seed: int) -> Dataset:
    name = options.dataset.lower()
    if name in _IMAGE_SETS:
        return _IMAGE_SETS[name](options)
    if name == _DIABETES:
        return load_diabetes(options)
    prefix, separator, rest = options.dataset.partition(":")
    match prefix.lower():
        case "synthetic":
            return load_synthetic(options, rest if separator else DEFAULT_SPECIFICATION, seed)
        case "synthetic-sparse":
            return load_synthetic_sparse(options, rest if separator else DEFAULT_SPARSE_SPECIFICATION, seed)
        case "synthetic-housing":
            return load_housing(options, rest if separator else DEFAULT_HOUSES, seed)
        case "csv" if separator:
            return load_csv(options, rest)
        case "text-folder" if separator:
            return load_text_folder(options, rest)
        case "npz" if separator:
            return load_npz(options, rest)
        case "text" if separator:
            return load_text(options, rest)
    if separator:
        return load_user(options)
    raise ConfigError(f"--dataset {options.dataset}: unknown; allowed are {', '.join(_CHOICES)}")
