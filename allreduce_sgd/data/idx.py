"""MNIST and its drop-in replacements (Fashion-MNIST): images and labels in IDX files of unsigned bytes.

The format (LeCun, Cortes, Burges): two zero bytes, the element type (0x08: unsigned byte), the number of dimensions,
each dimension as a big-endian 32-bit integer, then the elements, last dimension fastest.
"""

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allreduce_sgd.data.files import data_folder, find_file, read_file
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.remote import REMOTE_FILES
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError

__all__ = ["load_idx_images", "missing_names", "parse_idx"]

_CLASSES = 10
_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def parse_idx(content: bytes, path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array, of `dimensions` dimensions, in the IDX file `path` with the given (decompressed) content.

    Raises:
        ConfigError: wrong magic number, no elements, or a length other than the header announces.
    """
    shape = _shape(content, path, dimensions)
    header_bytes = _header_bytes(dimensions)
    expected_bytes = header_bytes + math.prod(shape)
    if len(content) != expected_bytes:
        problem = "truncated" if len(content) < expected_bytes else "too long"
        raise ConfigError(f"{path}: {problem}: {len(content)} bytes, but shape {shape} needs {expected_bytes}")
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    shape = _shape(read_file(path, _header_bytes(dimensions)), path, dimensions)
    # One byte more than announced, to see whether there are more.
    return parse_idx(read_file(path, _header_bytes(dimensions) + math.prod(shape) + 1), path, dimensions)


def _header_bytes(dimensions: int) -> int:
    return 4 + 4 * dimensions


def _shape(content: bytes, path: Path, dimensions: int) -> tuple[int, ...]:
    header_bytes = _header_bytes(dimensions)
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        raise ConfigError(f"{path}: begins with {content[:4].hex() or 'nothing'}; an IDX file here with {magic.hex()}")
    if len(content) < header_bytes:
        raise ConfigError(f"{path}: truncated: {len(content)} bytes, but the header alone has {header_bytes}")
    shape = struct.unpack(f">{dimensions}I", content[4:header_bytes])
    if 0 in shape:
        raise ConfigError(f"{path}: the header announces the shape {shape}; every dimension must be at least 1")
    return shape


def missing_names(folder: Path) -> list[str]:
    """Those of the four files that `folder` has neither plain nor as .gz."""
    return [name for pair in _FILES for name in pair if find_file(folder, name) is None]


def load_idx_images(options: DataOptions) -> Dataset:
    """`mnist` or `fashion-mnist`: inputs (n, 1, 28, 28) float32 in [0, 1], targets (n,) int64 in 0..9.

    Raises:
        ConfigError: a file is missing or damaged, or images and labels do not belong together.
    """
    name = options.dataset.lower()
    folder = data_folder(options)
    missing = missing_names(folder)
    if missing:
        urls = " ".join(file.url for file in REMOTE_FILES[name] if file.name.removesuffix(".gz") in missing)
        raise ConfigError(
            f"--dataset {name}: {folder} has no {', '.join(missing)} (plain or .gz); download {urls} into it, "
            "or name the folder that holds them with --data-dir"
        )
    train, test = (Split(*_read_pair(folder, *names)) for names in _FILES)
    return Dataset(name, train, test, tuple(train.inputs.shape[1:]), _CLASSES)


def _read_pair(folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    images_path = find_file(folder, images_name) or folder / images_name
    labels_path = find_file(folder, labels_name) or folder / labels_name
    images = _read_idx(images_path, 3)
    labels = _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ConfigError(f"{labels_path}: {len(labels)} labels, but {images_path} has {len(images)} images")
    inputs = torch.from_numpy(images.astype(np.float32)).div_(255).unsqueeze(1)
    return inputs, torch.from_numpy(labels.astype(np.int64))
