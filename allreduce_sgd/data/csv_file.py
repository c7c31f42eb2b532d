"""Tables of comma-separated values, as RFC 4180 describes them: `csv:FILE`, plain or gzip-compressed.

The first line names the columns. One holds the labels (`labels.py`); another may hold texts, which become hashed bags
of words (`words.py`), whatever other columns there are; else all others are numbers, the features. Rows are read one
after another, so that a table of texts need not fit into memory.
"""

import csv
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from allreduce_sgd.data.files import named_file, open_file
from allreduce_sgd.data.holdout import held_out, hold_out
from allreduce_sgd.data.labels import Labels, number
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.data.words import hashed_words, with_targets
from allreduce_sgd.errors import ConfigError, quoted
from allreduce_sgd.user_code import describe, refusing

__all__ = ["load_csv"]

# A short file may unpack to a line of any length, and an open quotation mark make the rest of the file one field.
_LONGEST = 1 << 24
_MOST_NAMED = 12


@dataclass(frozen=True)
class _Row:
    line: int
    fields: list[str]


def load_csv(options: DataOptions, name: str) -> Dataset:
    """The table `name`: inputs (n, columns) float32, or sparse ones of texts; targets (n,) int64 or float32.

    Raises:
        ConfigError: the file is missing or damaged, lacks a column, or a row does not fit; the text names the line.
    """
    path = named_file(options, name)
    with _long_fields():
        rows = _rows(path)
        header = next(rows, None)
        if header is None:
            raise ConfigError(f"{path}: is empty; expected a line with the names of columns")
        columns = [column.strip() for column in header.fields]
        label = _column(path, columns, options.label_column, "label-column")
        words = options.text_column or ("text" if "text" in columns else None)
        if words is None:
            return _of_numbers(options, name, path, columns, label, rows)
        text = _column(path, columns, words, "text-column")
        if text == label:
            raise ConfigError(f"--text-column {words}: it is the --label-column too; they must differ")
        return _of_texts(options, name, path, label, text, rows)


def _of_texts(options: DataOptions, name: str, path: Path, label: int, text: int, rows: Iterator[_Row]) -> Dataset:
    labels = Labels(str(path))

    def texts() -> Iterator[str]:
        for row in rows:
            labels.add(row.fields[label].strip(), row.line)
            yield row.fields[text]

    hashed = hashed_words(texts(), options.hash_features, options.max_tokens)
    targets, classes = labels.targets(options.ignore_index)
    samples = with_targets(hashed, targets, options.hash_features)
    mask = held_out(targets, options.test_fraction)
    return Dataset(
        f"csv:{name}",
        samples.selected(~mask),
        samples.selected(mask),
        (samples.longest + 1, 2),
        classes,
        sparse_features=options.hash_features + 1,
        ignore_index=options.ignore_index,
    )


def _of_numbers(
    options: DataOptions, name: str, path: Path, columns: list[str], label: int, rows: Iterator[_Row]
) -> Dataset:
    if len(columns) < 2:
        raise ConfigError(f"{path}: has no column beside {quoted(columns[label])}; at least one feature is needed")
    labels = Labels(str(path))
    values = array("f")
    for row in rows:
        labels.add(row.fields[label].strip(), row.line)
        for column, field in enumerate(row.fields):
            if column == label:
                continue
            value = number(field)
            if value is None:
                raise ConfigError(
                    f"{path}: line {row.line}: column {quoted(columns[column])} has {quoted(field)}; expected a finite "
                    "number (--text-column names a column of texts)"
                )
            values.append(value)
    targets, classes = labels.targets(options.ignore_index)
    inputs = torch.frombuffer(values, dtype=torch.float32) if values else torch.empty(0)
    samples = Split(inputs.reshape(len(targets), len(columns) - 1), targets)
    train, test = hold_out(samples, options.test_fraction)
    return Dataset(f"csv:{name}", train, test, (len(columns) - 1,), classes, ignore_index=options.ignore_index)


def _column(path: Path, columns: list[str], wanted: str, flag: str) -> int:
    if columns.count(wanted) == 1:
        return columns.index(wanted)
    if wanted in columns:
        raise ConfigError(f"{path}: line 1: names the column {quoted(wanted)} more than once")
    found = ", ".join(map(quoted, columns[:_MOST_NAMED])) + (", ..." if len(columns) > _MOST_NAMED else "")
    raise ConfigError(f"--{flag} {wanted}: {path} has no such column; its columns are {found}")


def _rows(path: Path) -> Iterator[_Row]:
    """The rows of the file, all of as many fields as the first; empty lines are left out."""
    reader = csv.reader(_lines(path), strict=True)
    width: int | None = None
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as problem:
            raise ConfigError(f"{path}: line {reader.line_num}: {describe(problem)}") from problem
        if fields is None:
            return
        if not fields:
            continue
        width = width or len(fields)
        if len(fields) != width:
            raise ConfigError(f"{path}: line {reader.line_num}: has {len(fields)} fields; the first line has {width}")
        yield _Row(reader.line_num, fields)


def _lines(path: Path) -> Iterator[str]:
    with refusing(f"{path}: cannot be read"), open_file(path) as file:
        line = 0
        while content := file.readline(_LONGEST + 1):
            line += 1
            if len(content) > _LONGEST:
                raise ConfigError(f"{path}: line {line}: has more than {_LONGEST} bytes")
            with refusing(f"{path}: line {line}: is not UTF-8 text"):
                text = content.decode("utf-8-sig" if line == 1 else "utf-8")
            yield text


@contextmanager
def _long_fields() -> Iterator[None]:
    """Have the csv module take fields as long as lines may be, longer than letters are."""
    before = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)
