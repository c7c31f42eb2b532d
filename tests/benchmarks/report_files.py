"""Reading what a report wrote: its page and its tables."""

from html.parser import HTMLParser
from pathlib import Path

__all__ = ["Page", "markdown_rows"]


class Page(HTMLParser):
    """What the tests ask of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def markdown_rows(file: Path) -> list[dict[str, str]]:
    lines = [line for line in file.read_text().splitlines() if line.startswith("|")]
    entries = [[entry.strip() for entry in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(entries[0], line, strict=True)) for line in entries[2:]]
