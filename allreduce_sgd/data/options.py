"""Options of the data set; imports no torch, so that `--help` is quick."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["SAMPLINGS", "DataOptions"]

SAMPLINGS = ("epoch", "uniform", "replacement")


@dataclass(frozen=True)
class DataOptions:
    """Which data set to train on, where its files are, and how it is prepared."""

    dataset: str = option(
        "digits",
        "data set: digits (in scikit-learn, nothing to download), mnist, fashion-mnist, cifar10, "
        "synthetic[:SAMPLES,SHAPE,CLASSES] (e.g. synthetic:4096,3x32x32,10; CLASSES 0 = regression), "
        "synthetic-sparse[:SAMPLES,FEATURES,CLASSES] (e.g. synthetic-sparse:20000,1000,2, for --model sparse-logistic; "
        "see --density), npz:FILE "
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
        "synthetic-sparse, npz without test arrays, text (its last part); the split does not depend on --seed, except "
        "for the synthetic ones",
        above=0.0,
        maximum=0.9,
    )
    validation_fraction: float | None = option(
        None,
        "share of the training samples held out to judge the training by (see --patience and --lr-schedule plateau), "
        "of a text its last part; the choice does not depend on --seed; not set: none",
        above=0.0,
        maximum=0.9,
    )
    block_length: int = option(64, "characters per sample of text:FILE", minimum=1)
    density: float = option(
        0.01, "share of the features that each sample of synthetic-sparse has, at least one", above=0.0, maximum=1.0
    )
    sampling: str = option(
        "epoch",
        "how the samples of a step are drawn: epoch (the next ones of a permutation of all samples, every sample once "
        "an epoch), uniform (a subset of all samples, whatever the other steps have) or replacement (each sample by "
        "itself from all of them, so the same one perhaps twice)",
        choices=SAMPLINGS,
    )
