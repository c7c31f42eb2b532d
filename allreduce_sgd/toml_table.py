"""Reading TOML by tables: every entry is taken once and checked, and every mistake names the file and the key.

A check takes a value and returns it as its type; where it is not allowed, it raises ValueError with the reason.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from allreduce_sgd.errors import ConfigError, quoted

__all__ = ["Table", "boolean", "count", "folder_name", "fraction", "list_of", "mapping", "one_of", "positive", "text"]

T = TypeVar("T")

_REQUIRED: Any = object()
_LONGEST_KEY = 100


class Table:
    """A table of the file, whose entries are taken one by one, so that what is left is unknown."""

    def __init__(self, path: Path, name: str, values: Mapping[str, Any]) -> None:
        self.path = path
        self._name = name
        self._values = dict(values)
        self._known: list[str] = []

    @property
    def where(self) -> str:
        """The file and the table, for texts."""
        return f"{self.path}: {self._name}" if self._name else str(self.path)

    def take(self, key: str, check: Callable[[Any], T], default: T = _REQUIRED) -> T:
        """Return the entry, checked; without one the default, or ConfigError where there is none."""
        self._known.append(key)
        if key not in self._values:
            if default is _REQUIRED:
                raise self.fail(key, "is missing")
            return default
        try:
            return check(self._values.pop(key))
        except ValueError as problem:
            raise self.fail(key, str(problem)) from None

    def table(self, key: str) -> "Table":
        """Return the table of this name, an empty one if there is none."""
        values: dict[str, Any] = self.take(key, mapping, {})
        return Table(self.path, f"{self._name}.{key}" if self._name else key, values)

    def rest(self) -> dict[str, Any]:
        """Return what was not taken yet, unchecked."""
        rest, self._values = self._values, {}
        return rest

    def end(self) -> None:
        """Raise ConfigError where something was not taken."""
        for key in self._values:
            raise self.fail(key, f"unknown key; allowed are {', '.join(self._known)}")

    def fail(self, key: str, why: str) -> ConfigError:
        """Return the error of this entry, to be raised."""
        told = key if key.isprintable() and len(key) <= _LONGEST_KEY else quoted(key)
        return ConfigError(f"{self.where}{'.' if self._name else ': '}{told}: {why}")


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\n" in value:
        raise ValueError(f"{quoted(value)} is not a line of text")
    return value


def folder_name(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text(value)):
        raise ValueError(f"{quoted(value)} does not serve for a folder; use letters, digits, - and _")
    return str(value)


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{quoted(value)} is not true or false")
    return value


def count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{quoted(value)} is not a whole number of at least 1")
    return value


def positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{quoted(value)} is not a number above 0")
    return float(value)


def fraction(value: Any) -> float:
    if positive(value) > 1:
        raise ValueError(f"{value} is not a fraction between 0 and 1")
    return float(value)


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{quoted(value)} is not a table")
    return value


def one_of(known: tuple[str, ...]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in known:
            raise ValueError(f"unknown value {quoted(value)}; choose from {', '.join(known)}")
        return str(value)

    return check


def list_of(check: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    def check_all(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{quoted(value)} is not a list")
        return tuple(check(each) for each in value)

    return check_all
