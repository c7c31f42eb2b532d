"""The folder of figures that a mode is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import check_plotting

__all__ = ["check_folder", "draw_figures"]


def check_folder(flag: str, folder: Path | None) -> None:
    """Raise ConfigError where the folder neither exists nor can be made, or nothing is there to draw with."""
    check_plotting(flag, folder)
    if folder is not None and not (folder.is_dir() or (folder.parent.is_dir() and not folder.exists())):
        raise ConfigError(f"{flag} {folder}: name a folder, or one to make in a folder that exists")


def draw_figures(rows: Sequence[Mapping[str, Any]], folder: Path | None) -> None:
    """Draw what the rows have into the folder, and say what each picture shows; None: draw nothing."""
    if folder is None:
        return
    from benchmarks.scaling.figures import draw

    folder.mkdir(exist_ok=True)
    for path, caption in draw(rows, folder):
        print(f"{path}: {caption}")
