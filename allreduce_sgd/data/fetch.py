"""Download of a data set's missing files.

It knows nothing of ranks: the caller lets one rank of each file system fetch and the others wait. A file appears under
its name only when it is complete and its checksum is right, so an interrupted download leaves nothing to trip over.
"""

import hashlib
import http.client
import os
import secrets
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from allreduce_sgd.data import cifar10, idx
from allreduce_sgd.data.files import data_folder
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.remote import REMOTE_FILES, RemoteFile
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import describe

__all__ = ["fetch", "missing_files"]

_CHUNK_BYTES = 1 << 18


def missing_files(options: DataOptions) -> list[RemoteFile]:
    """The files to download before `load_dataset`; empty if all are there, or if the set needs none."""
    name = options.dataset.lower()
    folder = data_folder(options)
    remote = REMOTE_FILES.get(name, ())
    if name == "cifar10":
        return [] if cifar10.is_present(folder) else list(remote)
    missing = idx.missing_names(folder) if remote else []
    return [file for file in remote if file.name.removesuffix(".gz") in missing]


def fetch(files: Sequence[RemoteFile], folder: Path, show_progress: bool, timeout_seconds: float) -> None:
    """Download `files` into `folder`, which is made if it is missing.

    `timeout_seconds` bounds the connection and every wait for further bytes, not the whole download.

    Raises:
        ConfigError: a download failed or was not what it should be, or the folder cannot be written; one line that
            says which files to get, from where, and into which folder. No partial file is left.
    """
    for position, file in enumerate(files):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch_one(file, folder, show_progress, timeout_seconds)
        except (OSError, ValueError, http.client.HTTPException) as error:
            wanted = ", ".join(f"{remaining.name} from {remaining.url}" for remaining in files[position:])
            raise ConfigError(
                f"cannot download {file.name} into {folder} ({describe(error)}); "
                f"put there by hand: {wanted}; or name the folder that holds them with --data-dir"
            ) from error


def _fetch_one(file: RemoteFile, folder: Path, show_progress: bool, timeout_seconds: float) -> None:
    # In the same folder, since a rename is atomic only within one file system; the random part keeps hosts apart
    # that share it. Not tempfile: its files are private to the user, while a data folder is often shared.
    partial = folder / f".{file.name}.{secrets.token_hex(8)}.part"
    try:
        with partial.open("xb") as output:
            _receive(file, output, show_progress, timeout_seconds)
            output.flush()
            os.fsync(output.fileno())
        partial.replace(folder / file.name)
    finally:
        partial.unlink(missing_ok=True)


def _receive(file: RemoteFile, output: BinaryIO, show_progress: bool, timeout_seconds: float) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    received_bytes = 0
    with (
        urllib.request.urlopen(file.url, timeout=timeout_seconds) as response,
        tqdm(total=file.size_bytes, desc=file.name, unit="B", unit_scale=True, disable=not show_progress) as bar,
    ):
        while chunk := response.read(_CHUNK_BYTES):
            output.write(chunk)
            digest.update(chunk)
            received_bytes += len(chunk)
            bar.update(len(chunk))
    if file.size_bytes is not None and received_bytes != file.size_bytes:
        raise ValueError(f"received {received_bytes} bytes, expected {file.size_bytes}")
    if digest.hexdigest() != file.md5:
        raise ValueError(f"received {received_bytes} bytes with MD5 {digest.hexdigest()}, expected {file.md5}")
