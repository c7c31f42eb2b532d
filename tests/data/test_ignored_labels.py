"""Targets to be ignored: where checks allow them, what they do to the number of classes, and how labels are counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from allreduce_sgd.data.label_counts import label_counts
from allreduce_sgd.data.split import Dataset, MapSplit, Split
from allreduce_sgd.errors import ConfigError
from tests.data.test_data_registry import load, save, tensors

TARGETS = [0, 1, 2, -1, 1, 0, -1, 2, 1, 0]


class Pairs:
    """A map-style data set of them."""

    def __len__(self) -> int:
        return len(TARGETS)

    def __getitem__(self, index: int) -> tuple[float, int]:
        return float(index), TARGETS[index]


@pytest.mark.parametrize("ignored", [-100, 255])
def test_they_make_no_class(tmp_path: Path, ignored: int) -> None:
    targets = np.where(np.array(TARGETS) < 0, ignored, TARGETS)
    name = save(tmp_path / "a.npz", inputs=np.ones((10, 2)), targets=targets)
    dataset = load(name, ignore_index=ignored, test_fraction=0.3)
    assert (dataset.classes, dataset.ignore_index) == (3, ignored)
    both = torch.cat([split.targets for split in tensors(dataset)])
    assert both.sort().values.tolist() == sorted(targets.tolist())


def test_labels_are_counted() -> None:
    split = Split(torch.ones(10, 2), torch.tensor(TARGETS))
    dataset = Dataset("a", split, split, (2,), 4, ignore_index=-1)
    assert label_counts(dataset) == (3, 3, 2, 0, 2)
    mapped = MapSplit("a", Pairs(), 4, -1)
    assert label_counts(Dataset("a", mapped, mapped, (), 4, ignore_index=-1)) == (3, 3, 2, 0, 2)
    # One that is a class is no longer counted as such.
    assert label_counts(load("digits", ignore_index=3))[3] == 0
    assert sum(label_counts(load("digits"))[:-1]) == 1438


def test_other_labels_outside_are_still_refused() -> None:
    split = Split(torch.ones(10, 2), torch.tensor(TARGETS))
    with pytest.raises(ConfigError, match=r"sample 3 has target -1; allowed are 0\.\.2 and -100, which is ignored"):
        Dataset("a", split, split, (2,), 3, ignore_index=-100)
    with pytest.raises(ConfigError, match=r"sample 3 has target -1; allowed are 0\.\.2$"):
        MapSplit("a", Pairs(), 3).batch(torch.arange(10))


def test_regressions_have_no_labels_to_count() -> None:
    with pytest.raises(ValueError, match="diabetes is a regression"):
        label_counts(load("diabetes"))
