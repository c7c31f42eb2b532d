"""Options of the data set; imports no torch, so that `--help` is quick."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["DataOptions"]


@dataclass(frozen=True)
class DataOptions:
    """Which data set to train on, where its files are, and how it is prepared."""

    dataset: str = option(
        "digits",
        "data set: digits (in scikit-learn, nothing to download), mnist, fashion-mnist, cifar10, "
        "synthetic[:SAMPLES,SHAPE,CLASSES] (e.g. synthetic:4096,3x32x32,10; CLASSES 0 = regression), npz:FILE "
        "(arrays train_inputs, train_targets, test_inputs, test_targets, or x_train ..., or inputs and targets), "
        "text:FILE (characters, for --model chargpt), or module:function of your own, which returns (train, test)",
        metavar="NAME",
    )
    data_dir: str | None = option(
        None,
        "folder that holds the data set's files themselves, plain or .gz; it may be read-only if they are all there; "
        "not set = $XDG_CACHE_HOME or ~/.cache, then allreduce_sgd/NAME; missing files are downloaded into it",
        metavar="DIR",
    )
    standardize: bool | None = option(
        None,
        "subtract the mean and divide by the standard deviation of the training set, per channel of images, per "
        "feature of vectors; not set = yes for digits, mnist, fashion-mnist and cifar10, no for all others",
    )
    test_fraction: float = option(
        0.2,
        "share of the samples kept for testing in data sets without a test split of their own: digits, synthetic, "
        "npz without test arrays, text (its last part); the split does not depend on --seed, except for synthetic",
        above=0.0,
        maximum=0.9,
    )
    block_length: int = option(64, "characters per sample of text:FILE", minimum=1)
