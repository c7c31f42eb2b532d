"""Whatever bytes a file holds, loading it succeeds or gives a one-line ConfigError, and ends soon."""

import gzip
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from allreduce_sgd.data.cifar10 import parse_python
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.errors import ConfigError
from tests.data.published_formats import (
    CIFAR_NAMES,
    IDX_NAMES,
    cifar_batches,
    cifar_binary,
    cifar_pickle,
    write_idx_set,
    write_tar,
)


def damaged(content: bytes, times: int) -> Iterator[bytes]:
    chance = random.Random(0)
    for i in range(times):
        changed = bytearray(content)
        if i % 3 == 0:
            del changed[chance.randrange(len(changed)) :]
        elif i % 3 == 1:
            for _ in range(chance.randint(1, 4)):
                # Headers are short, so half of the changes go there.
                end = min(400, len(changed)) if chance.random() < 0.5 else len(changed)
                changed[chance.randrange(end)] = chance.randrange(256)
        else:
            changed[chance.randrange(len(changed)) :] += chance.randbytes(chance.randint(1, 50))
        yield bytes(changed)


def survives(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except ConfigError as error:
        if "\n" not in str(error):
            return False
        raise
    return True


def loader(dataset: str, folder: Path) -> Callable[[], object]:
    return lambda: load_dataset(DataOptions(dataset=dataset, data_dir=str(folder)), 0)


def check(path: Path, attempt: Callable[[], object], times: int) -> None:
    content = path.read_bytes()
    assert survives(attempt)
    outcomes = []
    for changed in damaged(content, times):
        path.write_bytes(changed)
        outcomes.append(survives(attempt))
    assert not all(outcomes)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", IDX_NAMES[:2])
def test_idx(tmp_path: Path, name: str, compressed: bool) -> None:
    write_idx_set(tmp_path, compressed)
    check(tmp_path / (f"{name}.gz" if compressed else name), loader("mnist", tmp_path), 100)


@pytest.mark.parametrize("form", ["binary", "python", "archive"])
def test_cifar10(tmp_path: Path, form: str) -> None:
    files = {f"{n}.bin" if form != "python" else n: b for n, b in zip(CIFAR_NAMES, _contents(form), strict=True)}
    if form == "archive":
        write_tar(tmp_path / "cifar-10-binary.tar.gz", files)
        check(tmp_path / "cifar-10-binary.tar.gz", loader("cifar10", tmp_path), 60)
        return
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    check(tmp_path / next(iter(files)), loader("cifar10", tmp_path), 60)


def _contents(form: str) -> list[bytes]:
    write = cifar_pickle if form == "python" else cifar_binary
    return [write(*batch) for batch in cifar_batches(1).values()]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles(protocol: int) -> None:
    pixels, labels = cifar_batches(1)["test_batch"]
    content = cifar_pickle(pixels[:, :3072], labels, protocol)
    for changed in damaged(content, 600):
        survives(lambda changed=changed: parse_python(changed, "file"))  # type: ignore[misc]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.filterwarnings("ignore")
def test_npz(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "a.npz"
    save(path, inputs=np.ones((20, 3), np.float32), targets=np.arange(20) % 2)
    check(path, loader(f"npz:{path}", tmp_path), 300)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = ("Grüße, 世界! " * 100).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    check(path, loader(f"text:{path}", tmp_path), 60)


def test_an_announced_length_is_not_allocated() -> None:
    """A bytearray of 2^40 bytes, of which none follow: refused at once rather than allocated."""
    content = b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little")
    with pytest.raises(ConfigError, match="truncated"):
        parse_python(content, "file")


def test_a_large_memo_index_is_not_allocated() -> None:
    content = b"\x80\x02]r" + b"\xff\xff\xff\x7f" + b"."
    with pytest.raises(ConfigError, match="expected a dictionary"):
        parse_python(content, "file")
