"""Small data sets in the published file formats, for tests."""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np

IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx_set(folder: Path, compressed: bool = False, train: int = 12, test: int = 4) -> dict[str, np.ndarray]:
    """Random images and labels; returns the arrays by file name."""
    random = np.random.default_rng(0)
    arrays = {}
    for name in IDX_NAMES:
        count = train if name.startswith("train") else test
        shape = (count, 28, 28) if "images" in name else (count,)
        arrays[name] = random.integers(0, 256 if "images" in name else 10, shape).astype(np.uint8)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(arrays[name])))
        else:
            (folder / name).write_bytes(idx(arrays[name]))
    return arrays


def cifar_batches(records: int = 3) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Pixels (records, 3072) and labels by batch name."""
    random = np.random.default_rng(1)
    return {
        name: (
            random.integers(0, 256, (records, 3072)).astype(np.uint8),
            [int(label) for label in random.integers(0, 10, records)],
        )
        for name in CIFAR_NAMES
    }


def cifar_binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()


def cifar_pickle(pixels: np.ndarray, labels: list[int], protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": pixels, b"labels": labels, b"filenames": ["a.png"]}, protocol)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
