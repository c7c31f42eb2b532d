import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.split import Dataset, MapSplit, Split
from allreduce_sgd.errors import ConfigError

MODULE = """
import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

class Odd(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return torch.full((2,), float(i)), i % 2

class Named(Odd):
    classes = ["a", "b", "c"]

class Targets(Odd):
    targets = [0, 1, 4, 1]

def pair(n=4):
    return np.ones((n, 2), np.float64), np.arange(n) % 3

def arrays(): return pair(), pair()
def tensors(data_dir):
    assert data_dir == "somewhere"
    return [torch.rand(4, 2), torch.rand(4)], [torch.rand(4, 2), torch.rand(4)]
def maps(): return Odd(), Odd()
def named(): return Named(), Named()
def targets(): return Targets(), Odd()
def mixed(): return TensorDataset(torch.rand(3, 2), torch.tensor([0, 2, 1])), pair()
def integers(): return (torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.uint8)), pair()
def raises(): raise KeyError("two\\nlines")
def leaves(): raise SystemExit(3)
def none(): pass
def one(): return Odd()
def lists(): return ([1], [2]), ([1], [2])
def triple(): return (1, 2, 3), (1, 2, 3)
def wants(shape): pass
def empty(): return pair(0), pair()
def shapes(): return pair(), (np.ones((3, 5)), np.arange(3))
def labels(): return (np.ones((2, 2)), np.array([0, -1])), pair()
value = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_data.py").write_text(MODULE)
    (tmp_path / "broken_data.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "wrong_data.py").write_text("def f(:\n")
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in ("users_data", "broken_data", "wrong_data"):
        sys.modules.pop(name, None)


def load(function: str, standardize: bool | None = None, data_dir: str | None = None) -> Dataset:
    name = function if ":" in function else f"users_data:{function}"
    return load_dataset(DataOptions(dataset=name, standardize=standardize, data_dir=data_dir), 0)


def test_arrays_and_tensors() -> None:
    dataset = load("arrays")
    assert isinstance(dataset.train, Split)
    assert (dataset.classes, dataset.input_shape, dataset.train.inputs.dtype) == (3, (2,), torch.float32)
    assert load("tensors", data_dir="somewhere").classes is None
    assert load("integers").kind == "tokens"


@pytest.mark.parametrize(("function", "classes"), [("maps", 2), ("named", 3), ("targets", 5), ("mixed", 3)])
def test_map_style(function: str, classes: int) -> None:
    dataset = load(function)
    assert isinstance(dataset.train, MapSplit)
    assert (dataset.classes, dataset.input_shape) == (classes, (2,))
    assert len(dataset.train.batch(torch.tensor([0, 1]))[0]) == 2
    with pytest.raises(ConfigError, match="--standardize with"):
        load(function, standardize=True)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("raises", "the function raised: KeyError: 'two.*lines'"),
        ("leaves", "the function raised: SystemExit: 3"),
        ("none", "returned a NoneType; expected"),
        ("one", "returned a Odd; expected"),
        ("lists", "returned a tuple of 2 as a split; expected"),
        ("triple", "returned a tuple of 3 as a split; expected"),
        ("wants", "requires shape; it may name only data_dir"),
        ("value", "value is a int, expected a function"),
        ("absent", "users_data has no function absent"),
        ("empty", "empty"),
        ("shapes", r"test split: inputs have the shape \(5,\)"),
        ("labels", "train split: sample 1 has target -1"),
        ("tensors", "AssertionError"),
        ("no_such_data:f", "no module no_such_data in the current folder"),
        ("no_such.data:f", "no module no_such in the current folder"),
        ("broken_data:f", "importing broken_data raised: .*no_such_module_anywhere"),
        ("wrong_data:f", "importing wrong_data raised: SyntaxError"),
        (":f", "expected module:function"),
        ("users_data:", "expected module:function"),
        ("a/b.py:f", "expected module:function"),
    ],
)
def test_mistakes(function: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load(function)
    text = str(caught.value)
    assert "\n" not in text
    assert function in text


def test_the_original_exception_is_kept() -> None:
    with pytest.raises(ConfigError) as caught:
        load("raises")
    assert isinstance(caught.value.__cause__, KeyError)
