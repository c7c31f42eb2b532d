"""The folder of a report: made beside its place and moved there whole, and never in the place of anything else."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allreduce_sgd.errors import ConfigError
from benchmarks.interrupts import ended_in_order

__all__ = ["GENERATOR", "check_folder", "new_folder"]

GENERATOR = "benchmarks.report"
"""By which a page is known as a report of this program."""

_CONTENTS = {"index.html": None, "report.md": None, "figures": ".png", "tables": ".md"}
_READ_BYTES = 4096


def check_folder(folder: Path) -> None:
    """Raise ConfigError, naming the flag, unless a report may be put there: a new, an empty or a report's folder."""
    place = f"-o {folder}"
    if not folder.absolute().parent.is_dir():
        raise ConfigError(f"{place}: name a folder within a folder that exists")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{place}: not a folder")
    if folder.exists() and (found := _foreign(folder)) is not None:
        raise ConfigError(f"{place}: holds {found}, which is no part of an earlier report; name another folder")


def _foreign(folder: Path) -> str | None:
    """Return what is no part of a report, None where all is."""
    contents = sorted(folder.iterdir())
    for entry in contents:
        if entry.name not in _CONTENTS or entry.is_symlink():
            return entry.name
        suffix = _CONTENTS[entry.name]
        if entry.is_dir() != (suffix is not None):
            return entry.name
        if suffix is not None:
            for file in sorted(entry.iterdir()):
                if file.suffix != suffix or not file.is_file():
                    return f"{entry.name}/{file.name}"
    page = folder / "index.html"
    if contents and not (page.exists() and GENERATOR.encode() in page.read_bytes()[:_READ_BYTES]):
        return page.name if page.exists() else contents[0].name
    return None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its place, the earlier report's too, unless an error comes.

    Ended by SIGINT or SIGTERM, it leaves the earlier report, or the whole new one, and nothing else.
    """
    place = folder.absolute()
    with ended_in_order(), tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        yield new
        try:
            if place.exists():
                place.rename(old)
            new.rename(place)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            raise
