import gzip
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from allreduce_sgd.data.cifar10 import is_present, parse_binary, parse_python
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError
from tests.data.published_formats import CIFAR_NAMES, cifar_batches, cifar_binary, cifar_pickle, write_tar

BATCHES = cifar_batches()


def load(folder: Path, standardize: bool | None = False) -> Dataset:
    return load_dataset(DataOptions(dataset="cifar10", data_dir=str(folder), standardize=standardize), 0)


def write(folder: Path, form: str) -> None:
    binary = {f"{name}.bin": cifar_binary(*batch) for name, batch in BATCHES.items()}
    python = {name: cifar_pickle(*batch) for name, batch in BATCHES.items()}
    match form:
        case "binary":
            files = binary
        case "binary-gz":
            files = {f"{name}.gz": gzip.compress(content) for name, content in binary.items()}
        case "binary-subfolder":
            files = {f"cifar-10-batches-bin/{name}": content for name, content in binary.items()}
        case "python":
            files = python
        case "python-gz":
            files = {f"{name}.gz": gzip.compress(content) for name, content in python.items()}
        case "python-subfolder":
            files = {f"cifar-10-batches-py/{name}": content for name, content in python.items()}
        case "binary-archive":
            write_tar(folder / "cifar-10-binary.tar.gz", {f"cifar-10-batches-bin/{n}": c for n, c in binary.items()})
            return
        case "python-archive":
            write_tar(folder / "cifar-10-python.tar.gz", {f"../../{n}": c for n, c in python.items()})
            return
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


FORMS = [f"{kind}{way}" for kind in ("binary", "python") for way in ("", "-gz", "-subfolder", "-archive")]


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    assert not is_present(folder)
    write(folder, form)
    assert is_present(folder)
    dataset = load(folder)
    assert (len(dataset.train), len(dataset.test)) == (15, 3)
    assert dataset.input_shape == (3, 32, 32)
    assert isinstance(dataset.train, Split)
    pixels = np.concatenate([BATCHES[name][0] for name in CIFAR_NAMES[:5]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(dataset.train.inputs.numpy(), pixels.astype(np.float32) / np.float32(255))
    assert dataset.train.targets.tolist() == [label for name in CIFAR_NAMES[:5] for label in BATCHES[name][1]]
    # Nothing is ever unpacked, least of all outside the folder.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b"]


def test_standardised_per_channel(tmp_path: Path) -> None:
    write(tmp_path, "binary")
    dataset = load(tmp_path, None)
    assert isinstance(dataset.train, Split)
    assert torch.allclose(dataset.train.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(dataset.train.inputs.std((0, 2, 3)), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol(protocol: int) -> None:
    pixels, labels = BATCHES["test_batch"]
    images, read = parse_python(cifar_pickle(pixels, labels, protocol), "file")
    assert np.array_equal(images.reshape(-1, 3072), pixels)
    assert read.tolist() == labels


def test_column_major_arrays() -> None:
    pixels, labels = BATCHES["test_batch"]
    for protocol in (2, 5):
        images, _ = parse_python(cifar_pickle(np.asfortranarray(pixels), labels, protocol), "file")
        assert np.array_equal(images.reshape(-1, 3072), pixels)


class _Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder / "evil"),)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    content = pickle.dumps({b"data": _Evil(tmp_path), b"labels": []})
    with pytest.raises(ConfigError, match=r"^file: is no pickled.*posix.mkdir, which is not allowed"):
        parse_python(content, "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        {b"labels": [1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": ["x"]},
        {b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]},
        {b"data": np.zeros((1, 3072), np.float64), b"labels": [1]},
        {b"data": np.array([None]), b"labels": [1]},
    ],
)
def test_a_pickle_of_something_else(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^file: is no pickled CIFAR-10 batch"):
        parse_python(pickle.dumps(value, 2), "file")


@pytest.mark.parametrize("length", [0, 1, 3072, 3074])
def test_no_whole_number_of_records(length: int) -> None:
    with pytest.raises(ConfigError, match=f"^file: {length} bytes"):
        parse_binary(bytes(length), "file")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cifar10: .*has neither .*download https://.*--data-dir"):
        load(tmp_path)


def test_incomplete_archive(tmp_path: Path) -> None:
    write_tar(tmp_path / "cifar-10-binary.tar.gz", {"test_batch.bin": bytes(3073)})
    with pytest.raises(ConfigError, match=r"the archive has no data_batch_1\.bin"):
        load(tmp_path)


def test_the_real_cifar10(real_data: Path, tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    archive = np.load(real_data / "cifar10" / "cifar10-jpeg.npz")
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    arrays = {name: archive[name] for name in archive.files}

    def record(split: str, i: int) -> bytes:
        jpeg, offsets = arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"]
        image = pil.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
        return bytes([arrays[f"{split}_labels"][i]]) + np.asarray(image).transpose(2, 0, 1).tobytes()

    for batch in range(5):
        rows = [record("train", batch * 10_000 + i) for i in range(50)]
        (folder / f"data_batch_{batch + 1}.bin").write_bytes(b"".join(rows))
    (folder / "test_batch.bin").write_bytes(b"".join(record("test", i) for i in range(50)))
    dataset = load(tmp_path)
    assert isinstance(dataset.train, Split)
    assert set(dataset.train.targets.tolist()) == set(range(10))
    # The published mean of the training set, to within what 250 images allow.
    assert torch.allclose(dataset.train.inputs.mean((0, 2, 3)), torch.tensor([0.491, 0.482, 0.447]), atol=0.04)
