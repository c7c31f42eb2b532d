"""Where a data set's files are, and reading them whole, plain or gzip-compressed."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import refusing

__all__ = ["data_folder", "find_file", "named_file", "named_folder", "open_file", "read_file"]

# What is asked for at once is also reserved at once, whatever the file has.
_CHUNK_BYTES = 1 << 20


def data_folder(options: DataOptions) -> Path:
    """The folder of the data set's files: `data_dir`, or the user's cache; it need not exist."""
    if options.data_dir is not None:
        return Path(os.path.expanduser(options.data_dir))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "allreduce_sgd" / options.dataset.lower()


def find_file(folder: Path, name: str) -> Path | None:
    """The path of `name`, or else of `name`.gz, in `folder`; None if neither is a file."""
    # os.path rather than pathlib: a folder that may not be searched is the same as one without the file.
    return next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)


def named_file(options: DataOptions, name: str) -> Path:
    """The file of `--dataset npz:NAME`, `text:NAME` or `csv:NAME`: as given, or else relative to `data_dir`.

    Raises:
        ConfigError: there is no such file.
    """
    return _named(options, name, os.path.isfile, "file")


def named_folder(options: DataOptions, name: str) -> Path:
    """The folder of `--dataset text-folder:NAME`: as given, or else relative to `data_dir`.

    Raises:
        ConfigError: there is no such folder.
    """
    return _named(options, name, os.path.isdir, "folder")


def _named(options: DataOptions, name: str, exists: Callable[[Path], bool], what: str) -> Path:
    places = [Path(os.path.expanduser(name))]
    if options.data_dir is not None:
        places.append(data_folder(options) / name)
    for place in places:
        if name and exists(place):
            return place
    raise ConfigError(f"--dataset {options.dataset}: no such {what}: {' or '.join(map(str, places))}")


def read_file(path: Path, most_bytes: int | None = None) -> bytes:
    """The content of `path`, or its first `most_bytes`, decompressed if its name ends in .gz.

    A short file may unpack to any length, and a damaged one announce it: who knows a limit should give it.

    Raises:
        ConfigError: the file cannot be read, or its compression is damaged.
    """
    with refusing(f"{path}: cannot be read"), open_file(path) as file:
        if most_bytes is None:
            return file.read()
        chunks = []
        while most_bytes > 0 and (chunk := file.read(min(most_bytes, _CHUNK_BYTES))):
            chunks.append(chunk)
            most_bytes -= len(chunk)
        return b"".join(chunks)


def open_file(path: Path) -> BinaryIO:
    """Open `path` for reading, decompressed if its name ends in .gz; what goes wrong comes as anything."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
