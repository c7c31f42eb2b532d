import re
from pathlib import Path

import numpy as np
import pytest
import torch

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError


def load(name: str, data_dir: Path | None = None, seed: int = 0, **changes: object) -> Dataset:
    options = {"dataset": name, "data_dir": str(data_dir) if data_dir else None, **changes}
    return load_dataset(DataOptions(**options), seed)  # type: ignore[arg-type]


def tensors(dataset: Dataset) -> tuple[Split, Split]:
    assert isinstance(dataset.train, Split)
    assert isinstance(dataset.test, Split)
    return dataset.train, dataset.test


@pytest.mark.parametrize("name", ["nonsense", "npz", "text", ""])
def test_an_unknown_name_lists_the_choices(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--dataset .*allowed are digits, mnist, .*npz:FILE.*module:function"):
        load(name)


def test_digits() -> None:
    dataset = load("digits", standardize=False)
    train, test = tensors(dataset)
    assert (len(train), len(test)) == (1438, 359)
    assert dataset.input_shape == (1, 8, 8)
    assert dataset.classes == 10
    assert (float(train.inputs.min()), float(train.inputs.max())) == (0.0, 1.0)
    assert torch.bincount(test.targets).min() >= 34
    assert torch.equal(test.inputs, tensors(load("digits", seed=7, standardize=False))[1].inputs)
    assert abs(float(tensors(load("digits"))[0].inputs.mean())) < 1e-5
    assert len(load("digits", test_fraction=0.5).test) == pytest.approx(898, abs=5)


def test_digits_are_those_that_scikit_learn_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tensors(load("digits"))
    # Where its file is not found, it is asked itself.
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    theirs = tensors(load("digits"))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.inputs, other.inputs)
        assert torch.equal(mine.targets, other.targets)


def test_synthetic_classes() -> None:
    dataset = load("synthetic:1000,3x4x5,10", seed=3)
    train, test = tensors(dataset)
    assert (len(train), len(test), dataset.input_shape, dataset.classes) == (800, 200, (3, 4, 5), 10)
    assert torch.bincount(torch.cat([train.targets, test.targets])).tolist() == [100] * 10
    assert torch.equal(train.inputs, tensors(load("synthetic:1000,3x4x5,10", seed=3))[0].inputs)
    assert not torch.equal(train.inputs, tensors(load("synthetic:1000,3x4x5,10", seed=4))[0].inputs)
    centres = torch.stack([train.inputs[train.targets == c].mean(0) for c in range(10)]).flatten(1)
    predicted = torch.cdist(test.inputs.flatten(1), centres).argmin(1)
    assert (predicted == test.targets).float().mean() > 0.9


def test_synthetic_regression() -> None:
    dataset = load("synthetic:2000,20,0")
    train, test = tensors(dataset)
    assert dataset.classes is None
    assert train.targets.shape == (1600,)
    weights = torch.linalg.lstsq(train.inputs, train.targets[:, None]).solution
    assert float((test.inputs @ weights - test.targets[:, None]).std()) == pytest.approx(0.1, rel=0.2)


def test_synthetic_default() -> None:
    dataset = load("synthetic")
    assert (len(dataset.train) + len(dataset.test), dataset.input_shape, dataset.classes) == (4096, (1, 28, 28), 10)


@pytest.mark.parametrize(
    "specification", ["", "10", "10,5", "10,5,1", "1,5,2", "10,0x3,2", "10,axb,2", "-10,5,2", "10,5,2,3", "10,5x,2"]
)
def test_a_malformed_specification(specification: str) -> None:
    with pytest.raises(ConfigError, match=rf"--dataset synthetic:{specification}: expected synthetic:SAMPLES"):
        load(f"synthetic:{specification}")


def test_too_large_for_memory() -> None:
    with pytest.raises(ConfigError, match="cannot be made"):
        load("synthetic:999999999999,999999999,2")


ARRAYS = {
    "train_inputs": np.ones((6, 2)),
    "train_targets": np.array([0, 1, 2, 0, 1, 2]),
    "test_inputs": np.zeros((3, 2)),
    "test_targets": np.array([3, 1, 2]),
}


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return f"npz:{path}"


def test_npz(tmp_path: Path) -> None:
    dataset = load(save(tmp_path / "a.npz", **ARRAYS))
    train, test = tensors(dataset)
    assert (dataset.classes, dataset.input_shape, dataset.kind) == (4, (2,), "features")
    assert train.inputs.dtype == torch.float32
    assert train.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(test.inputs, torch.zeros(3, 2))
    assert load("npz:a.npz", data_dir=tmp_path).classes == 4


def test_npz_as_keras_writes_it(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 5, 5), np.uint8)
    labels = np.array([[1], [0], [1], [0]], np.uint8)
    dataset = load(save(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels))
    train, _ = tensors(dataset)
    assert np.allclose(train.inputs.numpy(), images / 255)
    assert train.targets.tolist() == [1, 0, 1, 0]


def test_npz_without_test_arrays(tmp_path: Path) -> None:
    name = save(tmp_path / "a.npz", inputs=np.arange(40, dtype=">i4").reshape(20, 2), targets=np.linspace(0, 1, 20))
    dataset = load(name, test_fraction=0.25)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (15, 5, None)
    assert tensors(dataset)[0].inputs.dtype == torch.float32


def test_npz_of_tokens(tmp_path: Path) -> None:
    codes = np.arange(40).reshape(20, 2) % 7
    dataset = load(save(tmp_path / "a.npz", inputs=codes, targets=codes))
    assert (dataset.kind, dataset.classes, dataset.input_shape) == ("tokens", 7, (2,))
    with pytest.raises(ConfigError, match="--standardize with --dataset npz"):
        load(save(tmp_path / "a.npz", inputs=codes, targets=codes), standardize=True)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"a": np.ones(3)}, "its arrays are 'a'; expected train_inputs"),
        ({"a\nb": np.ones(3)}, r"its arrays are 'a\\nb'; expected"),
        ({"inputs": np.ones(3)}, "its arrays are 'inputs'"),
        ({"inputs": np.array([None, 1]), "targets": np.ones(2)}, "allow_pickle=False"),
        ({"inputs": np.array(["x", "y"]), "targets": np.ones(2)}, "dtype <U1"),
        ({"inputs": np.ones((3, 1), complex), "targets": np.ones(3)}, "dtype complex128"),
        ({"inputs": np.ones((3, 1)), "targets": np.ones(2)}, "3 inputs, but 2 targets"),
        ({"inputs": np.float64(3), "targets": np.ones(2)}, "a single number"),
        ({"inputs": np.ones((3, 1)), "targets": np.array([1, 2, 10**12])}, "labels"),
        ({"inputs": np.ones((3, 1)), "targets": np.array([1, 2, -1])}, "target -1"),
        ({"inputs": np.ones((0, 1)), "targets": np.ones(0)}, "the split is empty"),
        ({"inputs": np.full((3, 1), np.nan), "targets": np.ones(3)}, "NaN"),
    ],
)
def test_npz_mistakes(tmp_path: Path, arrays: dict[str, np.ndarray], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load(save(tmp_path / "a.npz", **arrays), test_fraction=0.4)
    assert "a.npz" in str(caught.value)


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ConfigError, match=r"a\.npy: is no readable \.npz archive"):
        load(f"npz:{tmp_path / 'a.npy'}")


@pytest.mark.parametrize("kind", ["npz", "text"])
@pytest.mark.parametrize("name", ["", "absent", "."])
def test_no_such_file(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--dataset {kind}:{re.escape(name)}: no such file"):
        load(f"{kind}:{name}", data_dir=tmp_path)


def test_text(tmp_path: Path) -> None:
    text = "dcba äb\n" * 10
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    dataset = load(f"text:{tmp_path / 'a.txt'}", block_length=5, test_fraction=0.25)
    assert dataset.vocabulary == "\n abcdä"
    assert (dataset.classes, dataset.input_shape, dataset.kind) == (7, (5,), "tokens")
    train, test = tensors(dataset)
    assert (len(train), len(test)) == (59 // 5, 19 // 5)

    def decode(codes: torch.Tensor) -> str:
        return "".join(dataset.vocabulary[c] for c in codes.flatten().tolist())  # type: ignore[index]

    assert decode(train.inputs) == text[:55]
    assert decode(train.targets) == text[1:56]
    assert decode(test.inputs) == text[60:75]


def test_text_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc" * 10)
    with pytest.raises(ConfigError, match=r"a\.txt: the test part has 6 characters; --block-length 6 needs at least 7"):
        load(f"text:{path}", block_length=6)
    with pytest.raises(ConfigError, match="--standardize with"):
        load(f"text:{path}", block_length=2, standardize=True)
    path.write_bytes(b"ab\xff" * 10)
    with pytest.raises(ConfigError, match=r"a\.txt: is not UTF-8 text: .*position 2"):
        load(f"text:{path}")
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="has 0 characters"):
        load(f"text:{path}")


def test_the_real_tinyshakespeare(real_data: Path) -> None:
    dataset = load(f"text:{real_data / 'tinyshakespeare' / 'input.txt'}")
    assert (dataset.classes, dataset.input_shape) == (65, (64,))
    train, test = tensors(dataset)
    assert len(train) == (892_315 - 1) // 64
    assert torch.equal(train.inputs[0, 1:], train.targets[0, :-1])
    assert len(test) == (223_079 - 1) // 64
