"""Texts to classify, a file each: `text-folder:DIR`, as the movie reviews of Maas et al. 2011 are published.

Either DIR/train/CLASS/*.txt and DIR/test/CLASS/*.txt, or DIR/CLASS/*.txt, of which some are kept for testing. Classes
are numbered in the order of their sorted names, whatever order a file system lists them in. A text without words is a
sample like any other. Texts become hashed bags of words (`words.py`).
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from allreduce_sgd.data.files import named_folder, read_file
from allreduce_sgd.data.holdout import held_out
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.sparse_split import SparseSplit
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.data.words import hashed_words, with_targets
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import refusing

__all__ = ["load_text_folder"]

_FORM = "expected DIR/train/CLASS/*.txt and DIR/test/CLASS/*.txt, or DIR/CLASS/*.txt"


def load_text_folder(options: DataOptions, name: str) -> Dataset:
    """The texts in the folder `name`: sparse inputs (k + 1, 2) of the k words of the longest, targets (n,) int64.

    Raises:
        ConfigError: the folder is missing or has another form, a file cannot be read or is no UTF-8 text.
    """
    folder = named_folder(options, name)
    parts = [part for part in ("train", "test") if os.path.isdir(folder / part)]
    if len(parts) == 1:
        raise ConfigError(f"{folder}: has a folder {parts[0]}, but none for the other part; {_FORM}")
    places = [folder / part for part in parts] or [folder]
    classes = sorted({each for place in places for each in _names(place, folders=True)})
    if len(classes) < 2:
        raise ConfigError(f"{folder}: has {len(classes)} folders of classes, and at least 2 are needed; {_FORM}")
    splits = [_split(options, place, classes) for place in places]
    if len(splits) == 1:
        mask = held_out(splits[0].targets, options.test_fraction)
        splits = [splits[0].selected(~mask), splits[0].selected(mask)]
    longest = max(split.longest for split in splits)
    train, test = (replace(split, longest=longest) for split in splits)
    shape, features = (longest + 1, 2), options.hash_features + 1
    return Dataset(f"text-folder:{name}", train, test, shape, len(classes), sparse_features=features)


def _names(folder: Path, folders: bool) -> list[str]:
    """What is in `folder`, sorted: its folders, or else its texts."""
    with refusing(f"{folder}: cannot be listed"), os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.is_dir() if folders else entry.name.endswith(".txt") and entry.is_file())
        )


def _split(options: DataOptions, place: Path, classes: list[str]) -> SparseSplit:
    files: list[Path] = []
    labels: list[int] = []
    for label, each in enumerate(classes):
        if not os.path.isdir(place / each):
            continue
        own = [place / each / name for name in _names(place / each, folders=False)]
        if not own:
            raise ConfigError(f"{place / each}: has no texts, whose names end in .txt; {_FORM}")
        files += own
        labels += [label] * len(own)
    rows = hashed_words(_texts(files), options.hash_features, options.max_tokens)
    return with_targets(rows, torch.tensor(labels, dtype=torch.int64), options.hash_features)


def _texts(files: list[Path]) -> Iterator[str]:
    for path in files:
        content = read_file(path)
        with refusing(f"{path}: is not UTF-8 text"):
            text = content.decode("utf-8")
        yield text
