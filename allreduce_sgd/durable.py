"""Files that are whole or not there: written under a temporary name, flushed to disk, then renamed."""

import os
from pathlib import Path

__all__ = ["replace_file", "sync_folder", "write_file"]


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_file(temporary, content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until renames within the folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
