"""Options of the data set; imports no torch, so that `--help` is quick."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["AUGMENTATIONS", "SAMPLINGS", "DataOptions"]

AUGMENTATIONS = ("crop", "flip", "cutout")
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
        "text:FILE (characters, for --model chargpt), diabetes (in scikit-learn, a regression), "
        "synthetic-housing[:SAMPLES] (a regression like that of California's house prices), csv:FILE (a header, then a "
        "sample a row; see --label-column), text-folder:DIR (DIR/train/CLASS/*.txt and DIR/test/CLASS/*.txt, or "
        "DIR/CLASS/*.txt), or module:function of your own, which returns (train, test)",
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
        "feature of vectors, and of the targets of diabetes and synthetic-housing; not set = yes for digits, mnist, "
        "fashion-mnist, cifar10, diabetes and synthetic-housing, no for all others",
    )
    test_fraction: float = option(
        0.2,
        "share of the samples kept for testing in data sets without a test split of their own: digits, diabetes, the "
        "synthetic ones, csv, npz without test arrays, text-folder without train and test, text (its last part); the "
        "split does not depend on --seed, except for the synthetic ones",
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
    text_column: str | None = option(
        None,
        "column of csv:FILE that holds the texts; not set = text if there is such a column, else all columns but the "
        "label's are numbers",
        metavar="NAME",
    )
    label_column: str = option(
        "label",
        "column of csv:FILE that holds the labels: words or whole numbers are classes (in sorted order), numbers of "
        "which some are not whole make a regression",
        metavar="NAME",
    )
    hash_features: int = option(
        2**18,
        "words of text-folder and csv are hashed to so many features, for --model sparse-logistic",
        minimum=2,
        maximum=2**24,
    )
    max_tokens: int = option(
        1024, "different words of a text that count at most, in text-folder and csv: those with most weight", minimum=1
    )
    ignore_index: int | None = option(
        None,
        "targets of this value, in the range of the classes or not, are neither learnt nor counted: -100 as in torch",
        metavar="I",
    )
    augment: str | None = option(
        None,
        "change the images of training batches at random: some of crop, flip and cutout, separated by commas; the same "
        "on any number of ranks",
        metavar="NAMES",
    )
    sampling: str = option(
        "epoch",
        "how the samples of a step are drawn: epoch (the next ones of a permutation of all samples, every sample once "
        "an epoch), uniform (a subset of all samples, whatever the other steps have) or replacement (each sample by "
        "itself from all of them, so the same one perhaps twice)",
        choices=SAMPLINGS,
    )
    train_samples: int | None = option(
        None,
        "train on so many of the training samples only, the same in every run, more of them including fewer; with "
        "--validation-fraction these are divided; not set: all",
        minimum=1,
    )
