"""How often a training set has each label: what class weights are balanced by, and a mean of weights taken over."""

import torch

from allreduce_sgd.data.split import Dataset

__all__ = ["label_counts"]

_CHUNK = 1024


def label_counts(dataset: Dataset) -> tuple[int, ...]:
    """How often each class is a label of the training split, then how often a label is ignored.

    A map-style data set makes each of its samples once for this.

    Raises:
        ValueError: the data set is a regression.
    """
    if dataset.classes is None:
        raise ValueError(f"{dataset.name} is a regression and has no labels")
    counts = torch.zeros(dataset.classes + 1, dtype=torch.int64)
    for indices in torch.arange(len(dataset.train)).split(_CHUNK):
        labels = dataset.train.batch(indices)[1].flatten()
        if dataset.ignore_index is not None:
            labels = labels.masked_fill(labels == dataset.ignore_index, dataset.classes)
        counts += torch.bincount(labels, minlength=dataset.classes + 1)
    return tuple(counts.tolist())
