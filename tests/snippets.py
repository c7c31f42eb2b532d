"""Code and commands that stand in Markdown pages, for tests that run them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Snippet", "snippets", "training_commands"]

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?', re.MULTILINE | re.DOTALL)
_TRAIN = re.compile(r"^mpirun -np \d+ python -m allreduce_sgd\.train\b(.*)$", re.MULTILINE)


class Snippet(NamedTuple):
    """A block of code: its language, the file that it is said to be, and what it prints if the page tells."""

    language: str
    file: str | None
    code: str
    prints: str | None


def snippets(page: Path, language: str) -> Iterator[Snippet]:
    """Yield the page's blocks of this language."""
    for found, file, code, prints in _FENCE.findall(page.read_text(encoding="utf-8")):
        if found == language:
            yield Snippet(found, file or None, code, prints or None)


def training_commands(page: Path) -> list[list[str]]:
    """Return the arguments of every call of the trainer in the page's shell blocks."""
    return [
        shlex.split(arguments, comments=True)
        for block in snippets(page, "sh")
        for arguments in _TRAIN.findall(block.code)
    ]
