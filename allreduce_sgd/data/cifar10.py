"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32x32 pixels in 10 classes, in any published form.

Binary form: records of one label byte and 3072 pixel bytes (red, green, blue plane). Python form: pickled dictionaries
with `data` (n, 3072) and `labels`. Either may lie in the folder itself, in the subfolder that its archive makes, or in
the archive, which is read in place, so that the folder may be read-only and no path in the archive matters.
"""

import tarfile
from pathlib import Path

import numpy as np
import torch

from allreduce_sgd.data.files import data_folder, find_file, read_file
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.remote import REMOTE_FILES
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.data.unpickle import loads
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import refusing

__all__ = ["is_present", "load_cifar10", "parse_binary", "parse_python"]

_CLASSES = 10
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
# (archive, subfolder, ending of the file names), the quicker form first.
_FORMS = (
    ("cifar-10-binary.tar.gz", "cifar-10-batches-bin", ".bin"),
    ("cifar-10-python.tar.gz", "cifar-10-batches-py", ""),
)
# A batch has 31 MB; a damaged header may announce anything, and a short file unpack to it.
_LARGEST_BATCH_BYTES = 1 << 26

_Arrays = tuple[np.ndarray, np.ndarray]


def parse_binary(content: bytes, path: Path | str) -> _Arrays:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of a binary batch.

    Raises:
        ConfigError: the length is no whole number of records.
    """
    record_bytes = 1 + _PIXELS
    if not content or len(content) % record_bytes:
        raise ConfigError(f"{path}: {len(content)} bytes; expected a whole number of records of {record_bytes} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, record_bytes)
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0].astype(np.int64)


def parse_python(content: bytes, path: Path | str) -> _Arrays:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of a pickled batch.

    Raises:
        ConfigError: the pickle is damaged, asks for more than plain data, or is no CIFAR-10 batch.
    """
    with refusing(f"{path}: is no pickled CIFAR-10 batch"):
        batch = loads(content)
        if not isinstance(batch, dict):
            raise ValueError("expected a dictionary")
        images, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
        if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != _PIXELS or not len(images):
            raise ValueError(f"expected 'data' with the shape (n, {_PIXELS})")
        if not isinstance(labels, list) or len(labels) != len(images) or not all(type(v) is int for v in labels):
            raise ValueError(f"expected 'labels' with {len(images)} integers")
        return images.reshape(-1, *_SHAPE), np.array(labels, np.int64)


def _plain_files(folder: Path) -> dict[str, Path] | None:
    for _, subfolder, ending in _FORMS:
        for place in (folder / subfolder, folder):
            found = {name: find_file(place, name + ending) for name in _BATCHES}
            complete = {name: path for name, path in found.items() if path is not None}
            if len(complete) == len(_BATCHES):
                return complete
    return None


def _archive(folder: Path) -> tuple[Path, str] | None:
    return next(((folder / name, ending) for name, _, ending in _FORMS if (folder / name).is_file()), None)


def is_present(folder: Path) -> bool:
    """Whether `folder` holds all batches in one of the published forms."""
    return _plain_files(folder) is not None or _archive(folder) is not None


def _read_archive(path: Path, ending: str) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    wanted = {name + ending: name for name in _BATCHES}
    with refusing(f"{path}: cannot be read"), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.size > _LARGEST_BATCH_BYTES:
                raise ValueError(f"{member.name} announces {member.size} bytes")
            name = wanted.get(member.name.rpartition("/")[2])
            if name is None or not member.isfile():
                continue
            stream = archive.extractfile(member)
            if stream is not None:
                contents[name] = stream.read()
    missing = [name + ending for name in _BATCHES if name not in contents]
    if missing:
        raise ConfigError(f"{path}: the archive has no {', '.join(missing)}")
    return contents


def _read_batch(path: Path) -> bytes:
    content = read_file(path, _LARGEST_BATCH_BYTES + 1)
    if len(content) > _LARGEST_BATCH_BYTES:
        raise ConfigError(f"{path}: has more than {_LARGEST_BATCH_BYTES} bytes; a batch of CIFAR-10 has half as many")
    return content


def _read_batches(folder: Path) -> dict[str, _Arrays]:
    files = _plain_files(folder)
    if files is not None:
        return {
            name: (parse_binary if ".bin" in path.suffixes else parse_python)(_read_batch(path), path)
            for name, path in files.items()
        }
    archive = _archive(folder)
    if archive is not None:
        path, ending = archive
        parse = parse_binary if ending else parse_python
        contents = _read_archive(path, ending)
        return {name: parse(content, f"{path}: {name}{ending}") for name, content in contents.items()}
    raise ConfigError(
        f"--dataset cifar10: {folder} has neither data_batch_1..5.bin and test_batch.bin, nor data_batch_1..5 and "
        f"test_batch, nor {' nor '.join(name for name, _, _ in _FORMS)}; download {REMOTE_FILES['cifar10'][0].url} "
        "into it, or name the folder that holds them with --data-dir"
    )


def load_cifar10(options: DataOptions) -> Dataset:
    """`cifar10`: inputs (n, 3, 32, 32) float32 in [0, 1], targets (n,) int64 in 0..9.

    Raises:
        ConfigError: the files are missing or damaged.
    """
    batches = _read_batches(data_folder(options))
    train = [batches[name] for name in _BATCHES[:-1]]
    return Dataset("cifar10", _split(train), _split([batches[_BATCHES[-1]]]), _SHAPE, _CLASSES)


def _split(batches: list[_Arrays]) -> Split:
    images = np.concatenate([images for images, _ in batches]).astype(np.float32)
    labels = np.concatenate([labels for _, labels in batches])
    return Split(torch.from_numpy(images).div_(255), torch.from_numpy(labels))
