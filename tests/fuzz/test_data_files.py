"""Whatever bytes data files hold, loading them gives samples fit for training or a mistake told in one line.

Headers may announce any size: no more memory is used than files of this length can fill.
"""

import gzip
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from allreduce_sgd.data.cifar10 import parse_binary, parse_python
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.errors import ConfigError
from tests.data.published_formats import (
    CIFAR_NAMES,
    IDX_NAMES,
    cifar_batches,
    cifar_binary,
    cifar_pickle,
    idx,
    write_idx_set,
    write_tar,
)
from tests.fuzz.damage import bounded_memory, damaged, fuzz, refuses_in_one_line

MOST_BYTES = 256 << 20
# NumPy warns of what a damaged header makes it do.
pytestmark = pytest.mark.filterwarnings("ignore")


def load(dataset: str, folder: Path) -> Callable[[], object]:
    return lambda: load_dataset(DataOptions(dataset=dataset, data_dir=str(folder)), 0)


def archive_bytes(**arrays: np.ndarray) -> bytes:
    memory = io.BytesIO()
    np.savez(memory, **arrays)  # type: ignore[arg-type]  # its last named parameter is of another type
    return memory.getvalue()


def npy(header: bytes, content: bytes = b"") -> bytes:
    """An array's file whose header is any text."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return memory.getvalue()


IMAGES = idx(np.full((4, 28, 28), 7, np.uint8))
LABELS = idx(np.arange(4, dtype=np.uint8))
SAMPLES = archive_bytes(inputs=np.ones((8, 3), np.float32), targets=np.arange(8) % 2)
TOKENS = archive_bytes(inputs=np.ones((8, 3), np.uint16), targets=np.ones((8, 3), np.uint16))
HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 1000), }\n" % 10**9
NO_BYTES = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 0), }\n" % 10**12
CALL = b"{'descr': '<f4', 'fortran_order': print(), 'shape': (1,), }\n"
TEXT = ("Grüße, 世界! " * 20).encode()
MAILS = b"label,text\n" + b'spam,"win a ""prize"" now"\nham,see you tomorrow\n' * 10
NUMBERS = b"a,b,label\n" + b"1,2.5,0\n-3,1e-5,1\n" * 10
PIXELS, CIFAR_LABELS = cifar_batches(2)["test_batch"]
BATCH = cifar_binary(PIXELS, CIFAR_LABELS)


@fuzz(60)
@given(st.sampled_from(IDX_NAMES[:2]), st.booleans(), st.data())
def test_idx(tmp_path: Path, name: str, compressed: bool, data: st.DataObject) -> None:
    for each in IDX_NAMES:
        (tmp_path / f"{each}.gz").unlink(missing_ok=True)
        (tmp_path / each).write_bytes(IMAGES if "images" in each else LABELS)
    content = data.draw(damaged(IMAGES if "images" in name else LABELS, 16))
    (tmp_path / name).unlink()
    if compressed:
        whole = gzip.compress(content, mtime=0)
        content = data.draw(st.one_of(st.just(whole), damaged(whole, 10)))
    (tmp_path / (f"{name}.gz" if compressed else name)).write_bytes(content)
    refuses_in_one_line(load("mnist", tmp_path))


@fuzz(100)
@given(st.one_of(damaged(BATCH, len(BATCH)), st.binary(max_size=100)))
def test_binary_cifar(content: bytes) -> None:
    refuses_in_one_line(lambda: parse_binary(content, "data_batch_1.bin"))


@fuzz(120)
@given(st.sampled_from((0, 1, 2, 3, 4, 5)), st.data())
def test_pickled_cifar(protocol: int, data: st.DataObject) -> None:
    content = cifar_pickle(PIXELS[:, :3072], CIFAR_LABELS, protocol)
    changed = data.draw(st.one_of(damaged(content, 200), damaged(content, len(content)), st.binary(max_size=50)))
    refuses_in_one_line(lambda: parse_python(changed, "data_batch_1"))


def test_keys_that_take_for_ever_to_hash_are_refused() -> None:
    """A dictionary, and a set, of a tuple that holds one tuple twice, and so on, sixty levels deep."""
    # Each is put into the memo and popped; the last one is fetched from it.
    tuples = b")q\x000" + b"".join(b"h%ch%c\x86q%c0" % (level, level, level + 1) for level in range(60)) + b"h<"
    for content in (b"}" + tuples + b"K\x01s.", b"(" + tuples + b"K\x01d.", b"\x8f(" + tuples + b"\x90."):
        with pytest.raises(ConfigError, match=r"keys must be text|has a set"):
            parse_python(b"\x80\x04" + content, "file")


@fuzz(40)
@given(st.data())
def test_archive_of_cifar(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    if not path.exists():
        write_tar(path, {f"{name}.bin": BATCH for name in CIFAR_NAMES})
        (tmp_path / "whole.tar").write_bytes(gzip.decompress(path.read_bytes()))
        (tmp_path / "whole.tar.gz").write_bytes(path.read_bytes())
    inside = data.draw(st.booleans())
    whole = (tmp_path / ("whole.tar" if inside else "whole.tar.gz")).read_bytes()
    changed = data.draw(damaged(whole, 512))
    path.write_bytes(gzip.compress(changed, 1) if inside else changed)
    refuses_in_one_line(load("cifar10", tmp_path))


@fuzz(120)
@given(
    st.one_of(
        damaged(SAMPLES, 160),
        damaged(SAMPLES, len(SAMPLES)),
        damaged(TOKENS, len(TOKENS)),
        st.binary(max_size=100),
        st.binary(max_size=100).map(lambda header: zip_of({"inputs.npy": npy(header), "targets.npy": npy(header)})),
    )
)
@example(zip_of({"inputs.npy": npy(HUGE), "targets.npy": npy(HUGE)}))
@example(zip_of({"inputs.npy": npy(NO_BYTES), "targets.npy": npy(NO_BYTES)}))
@example(zip_of({"inputs.npy": npy(CALL), "targets.npy": npy(CALL)}))
@example(zip_of({"inputs.npy": npy(b"(" * 9000), "targets.npy": npy(b"-" * 60_000)}))
@example(zip_of({"in\nputs\x1b.npy": b""}))
@example(zip_of({"inputs": b"text", "targets": b"text"}))
@example(zip_of({f"{number:0200d}.npy": b"" for number in range(200)}))
@example(archive_bytes(inputs=np.array([{"a": 1}], object), targets=np.zeros(1)))
@example(archive_bytes(inputs=np.zeros((4, 2), "M8[s]"), targets=np.zeros(4)))
@example(archive_bytes(inputs=np.zeros((4, 2), np.complex64), targets=np.zeros(4)))
@example(archive_bytes(inputs=np.zeros(4, [("a", "<f4")]), targets=np.zeros(4)))
@example(archive_bytes(inputs=np.zeros((4, 2), "V0"), targets=np.zeros(4)))
@example(archive_bytes(inputs=np.zeros((4, 1)), targets=np.array([0, 1, 2**63, 2**64 - 1], np.uint64)))
@example(archive_bytes(inputs=np.zeros((4, 1)), targets=np.array([0, 1, 2, -(2**63)])))
@example(archive_bytes(inputs=np.full((4, 1), 1e300), targets=np.arange(4)))
@example(archive_bytes(inputs=np.full((4, 1), np.nan), targets=np.arange(4)))
@example(archive_bytes(inputs=np.array(1.0), targets=np.array(1.0)))
@example(archive_bytes(inputs=np.zeros((0, 3)), targets=np.zeros(0)))
@example(archive_bytes(inputs=np.zeros((1, 3)), targets=np.zeros(1)))
@example(archive_bytes(inputs=np.zeros((4,) + (1,) * 28), targets=np.arange(4)))
@example(archive_bytes(inputs=np.zeros((4, 3)), targets=np.zeros((4, 0))))
@example(archive_bytes(inputs=np.zeros((4, 3)), targets=np.zeros((4, 0), np.int64)))
def test_npz(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with bounded_memory(MOST_BYTES):
        refuses_in_one_line(load(f"npz:{path}", tmp_path))


@fuzz(60)
@given(st.one_of(st.binary(max_size=300), damaged(TEXT), st.text(min_size=100).map(str.encode)))
@example(b"\xef\xbb\xbf" + b"a" * 500)
@example(b"\0" * 500)
@example(b"a" * 500)
def test_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    refuses_in_one_line(load(f"text:{path}", tmp_path))


@fuzz(40)
@given(st.sampled_from((MAILS, NUMBERS)), st.data())
@example(b"", None)
@example(b"text,label\n", None)
@example(b"\xef\xbb\xbftext,label\n" + b"a,1\n" * 20, None)
@example(b"text,label\na,1\r" * 20, None)
@example(b'text,label\n"' + b"a,1\n" * 50_000, None)
@example(b"text,label\n" + b"a" * 1_000_000 + b",1\na,0\n", None)
@example(b"text,label\n" + b"".join(b"w%d,%d\n" % (n, n) for n in range(2000)), None)
@example(b"text,label\n" + b"".join(b"w%d " % n for n in range(100_000)) + b",0\n" + b",1\n" * 30_000, None)
@example(b"," * 100_000 + b"label\n" + b"1," * 100_000 + b"1\n", None)
@example(b"a,label\n" + b"1,1e308\n1,-1e308\n" * 20, None)
@example(b"a,label\n" + b"\0,\0\n" * 20, None)
@example(b"a\x1b\x0b,b\n1,2\n", None)
def test_csv(tmp_path: Path, content: bytes, data: st.DataObject | None) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content if data is None else data.draw(st.one_of(damaged(content), st.binary(max_size=100))))
    with bounded_memory(MOST_BYTES):
        refuses_in_one_line(load(f"csv:{path}", tmp_path))


@fuzz(20)
@given(st.one_of(st.binary(max_size=300), damaged(TEXT)))
@example(b"")
@example(b"\0" * 500)
@example(" ".join(f"w{number}" for number in range(100_000)).encode())
def test_text_folder(tmp_path: Path, content: bytes) -> None:
    for number in range(12):
        path = tmp_path / "ab"[number % 2] / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if number == 3 else b"some text")
    with bounded_memory(MOST_BYTES):
        refuses_in_one_line(load(f"text-folder:{tmp_path}", tmp_path))


@pytest.mark.parametrize(
    "case", ["idx header", "idx.gz", "cifar.gz", "cifar.tar.gz", "npz header", "npz zeros", "csv.gz"]
)
def test_an_announced_size_is_not_allocated(tmp_path: Path, case: str) -> None:
    """A header that announces gigabytes, or a short file that unpacks to them."""
    many = b"\0" * (1 << 20)
    dataset = "mnist"
    write_idx_set(tmp_path)
    images = tmp_path / IDX_NAMES[0]
    match case:
        case "idx header":
            images.write_bytes(bytes((0, 0, 8, 3)) + b"\xff" * 12)
        case "idx.gz":
            images.unlink()
            (tmp_path / f"{IDX_NAMES[0]}.gz").write_bytes(gzip.compress(IMAGES) + gzip.compress(many) * 1024)
        case "cifar.gz":
            dataset = "cifar10"
            for name in CIFAR_NAMES[1:]:
                (tmp_path / f"{name}.bin").write_bytes(BATCH)
            (tmp_path / f"{CIFAR_NAMES[0]}.bin.gz").write_bytes(gzip.compress(many) * 1024)
        case "cifar.tar.gz":
            dataset = "cifar10"
            write_tar(tmp_path / "cifar-10-binary.tar.gz", {"readme.html": many * 65})
        case "npz header":
            dataset = f"npz:{tmp_path / 'a.npz'}"
            (tmp_path / "a.npz").write_bytes(zip_of({"inputs.npy": npy(HUGE, many), "targets.npy": npy(HUGE, many)}))
        case "csv.gz":
            dataset = f"csv:{tmp_path / 'a.csv.gz'}"
            (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\n" + many * 64) + gzip.compress(many) * 1024)
        case "npz zeros":
            # Longer than its header announces.
            short = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1), }\n"
            dataset = f"npz:{tmp_path / 'a.npz'}"
            members = {"inputs.npy": npy(short, many * 64), "targets.npy": npy(short, many)}
            (tmp_path / "a.npz").write_bytes(zip_of(members, zipfile.ZIP_DEFLATED))
    with bounded_memory(MOST_BYTES):
        assert refuses_in_one_line(load(dataset, tmp_path)) or case == "npz zeros"


class Trap:
    """Has its pickle call something."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code ran",)


def test_no_file_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in CIFAR_NAMES:
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Trap(), b"labels": []}))
    assert refuses_in_one_line(load("cifar10", tmp_path))
    path = tmp_path / "a.npz"
    path.write_bytes(archive_bytes(inputs=np.array([Trap()], object), targets=np.zeros(1)))
    assert refuses_in_one_line(load(f"npz:{path}", tmp_path))
    path.write_bytes(archive_bytes(**{"inputs": np.zeros(4), "targets": np.array([Trap()] * 4, object)}))
    assert refuses_in_one_line(load(f"npz:{path}", tmp_path))
    assert capsys.readouterr().out == ""
