"""The report as Markdown: report.md, which refers to the figures, and a file for each table."""

from pathlib import Path

from benchmarks.report.content import Report, Section, Table

__all__ = ["write_markdown"]

_SPECIAL = str.maketrans({each: f"\\{each}" for each in "\\`*_[]|#"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})
_LONGEST_INLINE = 40


def write_markdown(report: Report, folder: Path) -> None:
    """Write report.md and tables/*.md into the folder."""
    tables = folder / "tables"
    tables.mkdir()
    parts = [f"# {escape(report.title)}", "## Summary", *_summary(report), "## What was run"]
    for section in report.sections:
        parts.append(f"### {escape(section.title)}")
        parts.append("\n".join(f"- {name}: {escape(value)}" for name, value in section.facts))
    for section in report.sections:
        parts.append(f"## {escape(section.title)}")
        for picture in section.pictures:
            parts.append(f"![{escape(picture.alternative)}](figures/{picture.name}.png)")
            parts.append(f"{escape(picture.caption)} Every number: [table](tables/{picture.source}.md).")
        for table in section.tables:
            text = format_markdown(table)
            (tables / f"{table.name}.md").write_text(f"# {escape(section.title)}\n\n{text}\n", encoding="utf-8")
            if len(table.rows) > _LONGEST_INLINE:
                parts.append(f"{escape(table.title)}: {len(table.rows)} rows in [a file](tables/{table.name}.md).")
            else:
                parts.append(f"#{text}")
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def format_markdown(table: Table) -> str:
    """Return the table with its title and note."""
    last = len(table.header) - 1
    rulers = [
        ":--" if index < table.text_columns or (index == last and table.last_is_text) else "--:"
        for index in range(len(table.header))
    ]
    lines = [f"## {escape(table.title)}", ""]
    lines += [_line(tuple(map(escape, table.header))), _line(tuple(rulers))]
    lines += [_line(tuple(escape(str(entry)) for entry in row)) for row in table.rows]
    if table.note:
        lines += ["", escape(table.note)]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return what Markdown shows as the text, on one line."""
    return " ".join(text.split()).translate(_SPECIAL)


def _summary(report: Report) -> list[str]:
    return [f"**{escape(section.title)}.** {_paragraphs(section)}" for section in report.sections]


def _paragraphs(section: Section) -> str:
    return "\n\n".join(map(escape, section.summary))


def _line(entries: tuple[str, ...]) -> str:
    return f"| {' | '.join(entries)} |"
