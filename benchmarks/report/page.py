"""The page: one file of HTML that holds its style and its figures, so that it opens from disk, without a network."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.report.content import Link, Report
from benchmarks.report.folder import GENERATOR

__all__ = ["write_page"]

_TEMPLATES = Path(__file__).parent / "templates"
_SIZE_FIELDS = slice(16, 24)
"""Of a PNG's bytes: its width and height, 4 bytes each."""
_WIDE_PIXELS = 1150
"""A figure that is wider has panels side by side, and a row for itself."""


def write_page(report: Report, folder: Path) -> None:
    """Write index.html into the folder that has the figures."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = {
        picture.name: (folder / "figures" / f"{picture.name}.png").read_bytes()
        for section in report.sections
        for picture in section.pictures
    }
    page = environment.get_template("page.html").render(
        report=report,
        generator=GENERATOR,
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        is_link=lambda entry: isinstance(entry, Link),
        source_of={name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in images.items()},
        wide_pixels=_WIDE_PIXELS,
        size_of={name: _size(png) for name, png in images.items()},
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


def _size(png: bytes) -> tuple[int, int]:
    """Return width and height."""
    fields = png[_SIZE_FIELDS]
    return int.from_bytes(fields[:4]), int.from_bytes(fields[4:])
