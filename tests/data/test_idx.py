import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from allreduce_sgd.data.idx import parse_idx
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.split import Split
from allreduce_sgd.errors import ConfigError
from tests.data.published_formats import IDX_NAMES, idx, write_idx_set


def mnist(folder: Path, standardize: bool | None = False, name: str = "mnist") -> DataOptions:
    return DataOptions(dataset=name, data_dir=str(folder), standardize=standardize)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "MNIST"])
def test_pixels_and_labels(tmp_path: Path, compressed: bool, name: str) -> None:
    arrays = write_idx_set(tmp_path, compressed)
    dataset = load_dataset(mnist(tmp_path, name=name), 0)
    assert (len(dataset.train), len(dataset.test)) == (12, 4)
    assert dataset.input_shape == (1, 28, 28)
    assert dataset.classes == 10
    assert dataset.kind == "features"
    inputs, targets = dataset.train.batch(torch.tensor([3, 5]))
    expected = arrays[IDX_NAMES[0]][[3, 5]].astype(np.float32) / np.float32(255)
    assert np.array_equal(inputs.squeeze(1).numpy(), expected)
    assert targets.tolist() == arrays[IDX_NAMES[1]][[3, 5]].tolist()
    assert targets.dtype == torch.int64


def test_the_default_standardises_with_the_training_set(tmp_path: Path) -> None:
    arrays = write_idx_set(tmp_path)
    dataset = load_dataset(mnist(tmp_path, None), 0)
    train = arrays[IDX_NAMES[0]] / 255
    expected = (arrays[IDX_NAMES[2]] / 255 - train.mean()) / train.std()
    assert isinstance(dataset.test, Split)
    assert np.allclose(dataset.test.inputs.squeeze(1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "begins with nothing"),
        (b"\0\0\x08\x01", "begins with 00000801"),
        (b"\0\0\x0d\x03" + bytes(12), "begins with 00000d03"),
        (b"\0\0\x08\x03\0\0", "truncated"),
        (idx(np.ones((2, 3, 3), np.uint8))[:-1], "truncated"),
        (idx(np.ones((2, 3, 3), np.uint8)) + b"x", "too long"),
        (idx(np.ones((0, 3, 3), np.uint8)), "at least 1"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "truncated"),
    ],
)
def test_damaged_content_names_the_file(content: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^some-file: .*{problem}") as caught:
        parse_idx(content, Path("some-file"), 3)
    assert "\n" not in str(caught.value)


def test_images_and_labels_of_different_number(tmp_path: Path) -> None:
    write_idx_set(tmp_path)
    (tmp_path / IDX_NAMES[1]).write_bytes(idx(np.zeros(11, np.uint8)))
    with pytest.raises(ConfigError, match=r"train-labels-idx1-ubyte: 11 labels, but .*12 images"):
        load_dataset(mnist(tmp_path), 0)


def test_a_label_outside_the_classes(tmp_path: Path) -> None:
    write_idx_set(tmp_path)
    (tmp_path / IDX_NAMES[3]).write_bytes(idx(np.array([1, 2, 10, 3], np.uint8)))
    with pytest.raises(ConfigError, match=r"mnist, test split: sample 2 has target 10; allowed are 0\.\.9"):
        load_dataset(mnist(tmp_path), 0)


def test_missing_files_name_folder_and_address(tmp_path: Path) -> None:
    write_idx_set(tmp_path)
    (tmp_path / IDX_NAMES[2]).unlink()
    with pytest.raises(ConfigError, match=rf"{re.escape(str(tmp_path))} has no t10k-images.* download https://"):
        load_dataset(mnist(tmp_path), 0)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "plain"])
def test_corrupt_compression(tmp_path: Path, damage: str) -> None:
    write_idx_set(tmp_path, compressed=True)
    path = tmp_path / f"{IDX_NAMES[0]}.gz"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-100:]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(gzip.decompress(content))
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        load_dataset(mnist(tmp_path), 0)


def test_the_real_fashion_mnist(real_data: Path) -> None:
    dataset = load_dataset(mnist(real_data / "fashion-mnist", None, "fashion-mnist"), 0)
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert isinstance(dataset.train, Split)
    assert torch.bincount(dataset.train.targets).tolist() == [6000] * 10
    assert abs(float(dataset.train.inputs.mean())) < 1e-3
    assert abs(float(dataset.train.inputs.std()) - 1) < 1e-3
    # 0 is black; the published mean and deviation of the training set are 0.2860 and 0.3530.
    assert float(dataset.train.inputs.min()) == pytest.approx(-0.2860 / 0.3530, abs=1e-3)
