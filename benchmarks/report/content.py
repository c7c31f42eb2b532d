"""What a report says, apart from how it is written down: the page and the Markdown are both made of this."""

from dataclasses import dataclass

__all__ = ["Link", "Picture", "Report", "Section", "Table"]


@dataclass(frozen=True)
class Link:
    """A table's entry that points at the row `row` of the table `table`."""

    text: str
    table: str
    row: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """`name` is that of its file and of its anchor; the first `text_columns` columns, and `last_is_text`, hold words.

    With `numbered` rows, the first column holds their numbers from 1 on, which links point at.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | Link, ...], ...]
    note: str = ""
    text_columns: int = 1
    last_is_text: bool = False
    numbered: bool = False
    collapsed: bool = False


@dataclass(frozen=True)
class Picture:
    """`name` is that of its file, without the suffix; `alternative` tells what is seen to those who do not see it.

    `source` names the table of the runs or rows that the picture shows.
    """

    name: str
    caption: str
    alternative: str
    source: str = ""


@dataclass(frozen=True)
class Section:
    """What one file of results says. `facts` tell what was run, where and by what; `summary` what was found.

    The facts of a `main` section stand open on the page.
    """

    name: str
    title: str
    facts: tuple[tuple[str, str], ...]
    summary: tuple[str, ...]
    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    main: bool = False


@dataclass(frozen=True)
class Report:
    title: str
    sections: tuple[Section, ...]
