import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from allreduce_sgd.data.fetch import fetch, missing_files
from allreduce_sgd.data.files import data_folder
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.remote import REMOTE_FILES, RemoteFile
from allreduce_sgd.errors import ConfigError
from tests.data.published_formats import IDX_NAMES, write_idx_set

CONTENT = bytes(range(256)) * 2000
MD5 = hashlib.md5(CONTENT).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/silent":
            threading.Event().wait(1)
            return
        self.wfile.write(CONTENT[:1000] if self.path == "/short" else CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def remote(server: str, path: str = "good", md5: str = MD5, size_bytes: int | None = None) -> RemoteFile:
    return RemoteFile("a-file.gz", f"{server}/{path}", md5, size_bytes)


@pytest.mark.parametrize("show_progress", [False, True])
def test_a_good_file_into_a_new_folder(
    server: str, tmp_path: Path, show_progress: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "folder"
    fetch([remote(server, size_bytes=len(CONTENT))], folder, show_progress, 5)
    assert (folder / "a-file.gz").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["a-file.gz"]
    assert ("a-file.gz" in capsys.readouterr().err) == show_progress
    mask = os.umask(0)
    os.umask(mask)
    assert (folder / "a-file.gz").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("path", "md5", "size_bytes", "problem"),
    [
        ("good", "0" * 32, None, "MD5"),
        ("good", MD5, 5, f"received {len(CONTENT)} bytes, expected 5"),
        ("short", MD5, len(CONTENT), "received 1000 bytes"),
        ("short", MD5, None, "MD5|IncompleteRead"),
        ("absent", MD5, None, "404"),
        ("silent", MD5, None, "[Tt]ime"),
    ],
)
def test_a_bad_download_leaves_nothing(
    server: str, tmp_path: Path, path: str, md5: str, size_bytes: int | None, problem: str
) -> None:
    bad = remote(server, path, md5, size_bytes)
    with pytest.raises(ConfigError, match=problem) as caught:
        fetch([bad], tmp_path, False, 0.3)
    text = str(caught.value)
    assert all(part in text for part in ("a-file.gz", bad.url, str(tmp_path), "--data-dir"))
    assert "\n" not in text
    assert not list(tmp_path.iterdir())


def test_files_after_a_bad_one_are_named_too(server: str, tmp_path: Path) -> None:
    files = [
        RemoteFile("first", f"{server}/good", MD5),
        RemoteFile("second", f"{server}/absent", MD5),
        RemoteFile("third", f"{server}/good", MD5),
    ]
    with pytest.raises(ConfigError, match=r"cannot download second .* second from .* third from") as caught:
        fetch(files, tmp_path, False, 5)
    assert "first from" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ConfigError, match="refused"):
        fetch([remote(f"http://127.0.0.1:{port}")], tmp_path, False, 5)


def test_a_folder_that_cannot_be_made_or_written(server: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot download a-file.gz into .*file"):
        fetch([remote(server)], tmp_path / "file", False, 5)
    if os.geteuid() == 0:
        # Permissions do not stop root, but nobody creates files in /proc.
        with pytest.raises(ConfigError, match="into /proc"):
            fetch([remote(server)], Path("/proc"), False, 5)
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="Permission"):
            fetch([remote(server)], tmp_path / "locked", False, 5)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_which_idx_files_are_missing(tmp_path: Path, name: str, compressed: bool) -> None:
    options = DataOptions(dataset=name, data_dir=str(tmp_path))
    assert missing_files(options) == list(REMOTE_FILES[name])
    write_idx_set(tmp_path, compressed)
    assert missing_files(options) == []
    (tmp_path / (IDX_NAMES[1] + (".gz" if compressed else ""))).unlink()
    assert [file.name for file in missing_files(options)] == [f"{IDX_NAMES[1]}.gz"]


def test_cifar10_is_one_archive(tmp_path: Path) -> None:
    options = DataOptions(dataset="cifar10", data_dir=str(tmp_path / "none"))
    assert [file.name for file in missing_files(options)] == ["cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("name", ["digits", "synthetic", "npz:a.npz", "module:function", "nonsense"])
def test_sets_that_need_no_files(name: str) -> None:
    assert missing_files(DataOptions(dataset=name)) == []


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_folder(DataOptions(dataset="mnist")) == tmp_path / "allreduce_sgd" / "mnist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert data_folder(DataOptions(dataset="mnist")) == Path("/somebody/.cache/allreduce_sgd/mnist")
    assert data_folder(DataOptions(data_dir="~/x")) == Path("/somebody/x")


def test_published_checksums_match_the_real_files(real_data: Path) -> None:
    for file in REMOTE_FILES["fashion-mnist"]:
        content = (real_data / "fashion-mnist" / file.name).read_bytes()
        assert len(content) == file.size_bytes
        # The images there were compressed anew, with another date in the header; the labels are as published.
        if "labels" in file.name:
            assert hashlib.md5(content).hexdigest() == file.md5
