"""Texts to classify, in folders and tables, as hashed bags of words; tables of numbers."""

import csv
import gzip
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.sparse_split import SparseSplit
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.data.words import hashed_words, with_targets
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.losses import build_loss
from allreduce_sgd.models.options import ModelOptions
from allreduce_sgd.models.registry import build_model
from tests.data.spam import write_spam
from tests.data.test_data_registry import tensors

FEATURES = 64


def load(name: str, **changes: object) -> Dataset:
    return load_dataset(DataOptions(dataset=name, **{"hash_features": FEATURES, **changes}), 0)  # type: ignore[arg-type]


def table(path: Path, *rows: object) -> str:
    """A table of rows, which are sequences of fields, or lines as they are."""
    with path.open("w", newline="", encoding="utf-8") as file:
        for row in rows:
            if isinstance(row, str):
                file.write(row)
            else:
                csv.writer(file).writerow(row)  # type: ignore[arg-type]
    return f"csv:{path}"


def sparse(split: object) -> SparseSplit:
    assert isinstance(split, SparseSplit)
    return split


def dense(inputs: Tensor, features: int) -> Tensor:
    return torch.zeros(len(inputs), features).scatter_add_(1, inputs[:, :, 0].long(), inputs[:, :, 1])


TEXTS = ["Win money, WIN now", "", "a b", "see you at the meeting tomorrow morning", "grüße an alle"]


def test_words_are_hashed_as_scikit_learn_does() -> None:
    from sklearn.feature_extraction.text import HashingVectorizer

    samples = with_targets(hashed_words(TEXTS, FEATURES, 100), torch.arange(5), FEATURES)
    inputs, targets = samples.batch(torch.arange(5))
    assert targets.tolist() == [0, 1, 2, 3, 4]
    expected = torch.from_numpy(HashingVectorizer(n_features=FEATURES).transform(TEXTS).toarray()).float()
    torch.testing.assert_close(dense(inputs, FEATURES + 1), torch.cat([expected, torch.ones(5, 1)], 1))
    # Once: what is padded has the index of the constant, and the value 0.
    assert inputs[1].tolist() == [[FEATURES, 1.0]] + [[FEATURES, 0.0]] * samples.longest


def test_a_batch_is_as_wide_as_its_longest_sample() -> None:
    samples = with_targets(hashed_words(TEXTS, FEATURES, 100), torch.arange(5), FEATURES)
    assert samples.batch(torch.tensor([1, 2]))[0].shape == (2, 1, 2)
    assert samples.batch(torch.tensor([2, 0]))[0].shape == (2, 4, 2)
    assert samples.batch(torch.tensor([], dtype=torch.int64))[0].shape == (0, samples.longest + 1, 2)
    some = samples.selected(torch.tensor([True, False, False, True, False]))
    torch.testing.assert_close(
        dense(some.batch(torch.arange(2))[0], 65), dense(samples.batch(torch.tensor([0, 3]))[0], 65)
    )
    assert some.targets.tolist() == [0, 3]


def test_of_a_long_text_the_words_with_most_weight_are_kept() -> None:
    text = "rare common common common usual usual"
    (offsets, indices, values), whole = hashed_words([text], 2**20, 2), hashed_words([text], 2**20, 9)
    assert (offsets.tolist(), whole[0].tolist()) == ([0, 2], [0, 3])
    assert indices.tolist() == sorted(indices.tolist())
    assert sorted(values.abs().tolist()) == pytest.approx([2 / math.sqrt(14), 3 / math.sqrt(14)])


def test_a_folder_of_texts(tmp_path: Path) -> None:
    for place in ("test/pos/b", "test/neg/a", "train/pos/d", "train/pos/c", "train/neg/e", "train/.git/x"):
        path = tmp_path / f"{place}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {path.stem}{path.stem}")
    (tmp_path / "train" / "pos" / "notes.md").write_text("not read")
    dataset = load(f"text-folder:{tmp_path}")
    train, test = sparse(dataset.train), sparse(dataset.test)
    assert (dataset.classes, dataset.kind, dataset.sparse_features, dataset.input_shape) == (2, "sparse", 65, (3, 2))
    assert (train.targets.tolist(), test.targets.tolist()) == ([0, 1, 1], [0, 1])
    expected = with_targets(hashed_words(["text ee", "text cc", "text dd"], FEATURES, 9), train.targets, FEATURES)
    assert torch.equal(train.batch(torch.arange(3))[0], expected.batch(torch.arange(3))[0])
    assert load("text-folder:" + tmp_path.name, data_dir=str(tmp_path.parent)).classes == 2


def test_a_folder_without_a_test_part(tmp_path: Path) -> None:
    for number in range(30):
        path = tmp_path / "abc"[number % 3] / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if number == 0 else f"word{number}")
    dataset = load(f"text-folder:{tmp_path}", test_fraction=0.2)
    assert sparse(dataset.test).targets.bincount().tolist() == [2, 2, 2]
    assert sparse(dataset.train).targets.bincount().tolist() == [8, 8, 8]
    assert dataset.classes == 3


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "has 0 folders of classes, and at least 2 are needed; expected DIR/train/CLASS"),
        ({"pos/a.txt": b"x"}, "has 1 folders of classes"),
        ({"pos/a.txt": b"x", "neg/a.md": b"x"}, "/neg: has no texts, whose names end in .txt"),
        ({"train/pos/a.txt": b"x", "train/neg/a.txt": b"x"}, "has a folder train, but none for the other part"),
        ({"pos/a.txt": b"x", "neg/a.txt": b"ab\xff"}, "/neg/a.txt: is not UTF-8 text: .*position 2"),
        ({"pos/a.txt": b"x", "neg/a.txt": b"x"}, "test split: the split is empty"),
    ],
)
def test_folders_of_another_form(tmp_path: Path, files: dict[str, bytes], problem: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        load(f"text-folder:{tmp_path}")
    assert str(tmp_path) in str(caught.value)


def test_a_table_of_texts(tmp_path: Path) -> None:
    rows = [[str(n), 'a "quoted", text\nof two lines', "spam" if n % 2 else "ham"] for n in range(20)]
    name = table(tmp_path / "a.csv", "\ufeffid,text,label\r\n", "\r\n", *rows)
    dataset = load(name)
    assert (dataset.classes, dataset.sparse_features, len(dataset.train), len(dataset.test)) == (2, 65, 16, 4)
    assert sparse(dataset.test).targets.bincount().tolist() == [2, 2]
    expected = with_targets(hashed_words(["quoted text of two lines"], FEATURES, 9), torch.tensor([0]), FEATURES)
    assert torch.equal(dataset.train.batch(torch.tensor([0]))[0], expected.batch(torch.tensor([0]))[0])
    zipped = tmp_path / "b.csv.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    again = load(f"csv:{zipped}", text_column="text")
    assert torch.equal(sparse(again.train).features, sparse(dataset.train).features)


def test_other_columns_of_texts_and_labels(tmp_path: Path) -> None:
    name = table(tmp_path / "a.csv", ["kind", "mail"], *([n % 3, f"word{n % 3}"] for n in range(30)))
    dataset = load(name, text_column="mail", label_column="kind")
    assert (dataset.classes, dataset.input_shape) == (3, (2, 2))


def test_tables_of_numbers(tmp_path: Path) -> None:
    rows = [[n, -1 if n % 2 else 1, n / 4] for n in range(20)]
    dataset = load(table(tmp_path / "a.csv", ["a", "label", "b"], *rows))
    train, test = tensors(dataset)
    assert (dataset.classes, dataset.input_shape, dataset.kind) == (2, (2,), "features")
    assert (len(train), len(test)) == (16, 4)
    assert torch.equal(train.inputs[:, 0], train.inputs[:, 1] * 4)
    # -1 comes before 1.
    assert torch.equal(train.targets, (train.inputs[:, 0].long() + 1) % 2)
    dataset = load(table(tmp_path / "a.csv", ["a", "label"], *([n, n / 2] for n in range(20))), standardize=True)
    assert dataset.classes is None
    assert tensors(dataset)[0].targets.dtype == torch.float32
    assert float(tensors(dataset)[0].inputs.mean()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "ignore_index", "targets", "classes"),
    [
        (["b", "a", "10", "9"], None, [3, 2, 0, 1], 4),
        (["10", "9", "9.0", "1e1"], None, [1, 0, 0, 1], 2),
        (["7", "7", "7", "7"], None, [0, 0, 0, 0], 2),
        (["2", "-100", "1", "2"], -100, [1, -100, 0, 1], 2),
        (["a", "b", "-100", "b"], -100, [0, 1, -100, 1], 2),
        (["1", "2.5", "3", "4"], None, [1.0, 2.5, 3.0, 4.0], None),
    ],
)
def test_labels(
    tmp_path: Path, labels: list[str], ignore_index: int | None, targets: list[float], classes: int | None
) -> None:
    rows = [[row, label] for row, label in enumerate(labels * 5)]
    dataset = load(table(tmp_path / "a.csv", ["row", "label"], *rows), ignore_index=ignore_index)
    assert dataset.classes == classes
    for split in tensors(dataset):
        for row, target in zip(split.inputs[:, 0].long().tolist(), split.targets.tolist(), strict=True):
            assert target == targets[row % 4]


@pytest.mark.parametrize(
    ("rows", "changes", "problem"),
    [
        ([], {}, "a.csv: is empty; expected a line with the names of columns"),
        (["\n\n"], {}, "a.csv: is empty"),
        ([["a", "label"]], {}, "the split is empty"),
        ([["text", "label"]], {}, "the split is empty"),
        ([["a", "b"], [1, 2]], {}, r"--label-column label: .*a.csv has no such column; its columns are 'a', 'b'"),
        ([["a", "label"], [1, 2]], {"text_column": "mail"}, "--text-column mail: .* no such column"),
        ([["a", "label"], [1, 2]], {"text_column": "label"}, "--text-column label: it is the --label-column too"),
        ([["label"], [1]], {}, "has no column beside 'label'; at least one feature is needed"),
        ([["a", "label", "label"], [1, 2, 3]], {}, "line 1: names the column 'label' more than once"),
        ([["a", "label"], [1, 2], [1, 2, 3]], {}, "line 3: has 3 fields; the first line has 2"),
        ([["a", "label"], ["x", 2]], {}, "line 2: column 'a' has 'x'; expected a finite number"),
        ([["a", "label"], ["nan", 2]], {}, "line 2: column 'a' has 'nan'"),
        ([["a", "label"], ["1e39", 2]], {}, "line 2: column 'a' has '1e39'"),
        ([["a", "label"], [1, ""]], {}, "line 2: the label is empty"),
        ([["a", "label"], [1, 2], [1, "nan"]], {}, "line 3: the label 'nan' is not finite"),
        (["a,label\n", '"x,1\n', "y,2\n"], {}, "line 3: Error: unexpected end of data"),
        (["text,label\n", 'a"b,1\n', '"a"b,2\n'], {}, "line 3: Error: .* expected after"),
        ([["a", "label"], *([n, n] for n in range(300))], {}, "300 samples have 300 different values, too many"),
        (
            [["a", "label"], *([n, n / 2] for n in range(9))],
            {"ignore_index": 1},
            "--ignore-index 1: .* regression",
        ),
        (
            [["text", "label"], *([n, n % 2] for n in range(20))],
            {"standardize": True},
            "--standardize .*: inputs are pairs of index and value",
        ),
    ],
)
def test_mistakes_in_tables(tmp_path: Path, rows: list[object], changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(table(tmp_path / "a.csv", *rows), **changes)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\nabc,1\nab\xff,0\n")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}: line 3: is not UTF-8 text: .*position 2"):
        load(f"csv:{path}")
    before = csv.field_size_limit()
    with pytest.raises(ConfigError, match="no such file"):
        load(f"csv:{tmp_path}")
    with pytest.raises(ConfigError, match="no such folder"):
        load(f"text-folder:{path}")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("classes", [2, 3])
def test_the_sparse_model_learns_texts(tmp_path: Path, classes: int) -> None:
    """By full-batch gradient descent; the constant feature is the bias, padding touches no other row."""
    write_spam(tmp_path / "spam.csv", 300, classes)
    dataset = load(f"csv:{tmp_path / 'spam.csv'}", hash_features=4096)
    assert (dataset.classes, dataset.sparse_features) == (classes, 4097)
    options = ModelOptions(model="sparse-logistic")
    model = build_model(options, dataset.input_shape, classes, 0, dataset.kind, dataset.sparse_features)
    loss = build_loss(None, "sparse-logistic", classes)
    inputs, targets = dataset.train.batch(torch.arange(len(dataset.train)))
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    for _ in range(40):
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        gradient = next(model.parameters()).grad
        assert gradient is not None
        assert gradient.is_sparse
        optimizer.step()
    assert gradient is not None
    touched = set(gradient.coalesce().indices()[0].tolist())
    assert touched == set(inputs[inputs[:, :, 1] != 0][:, 0].long().tolist())
    test_inputs, test_targets = dataset.test.batch(torch.arange(len(dataset.test)))
    right = loss.correct(model(test_inputs), test_targets)
    assert right is not None
    assert float(right) / len(dataset.test) > 0.95
    with pytest.raises(ConfigError, match="--model mlp takes features, not sparse samples"):
        build_model(ModelOptions(), dataset.input_shape, classes, 0, dataset.kind)
