"""Command lines of the benchmarks: every mistake is a ConfigError of one line that names the flag."""

import argparse
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from allreduce_sgd.errors import ConfigError

__all__ = [
    "Parser",
    "check_plotting",
    "check_writable",
    "fraction",
    "latency_and_rate",
    "names",
    "positive_int",
    "positive_ints",
    "positive_number",
    "positive_numbers",
]


class _ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends in the flag's default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError and takes no abbreviated flags."""

    def __init__(self, program: str, description: str) -> None:
        super().__init__(
            prog=f"python -m benchmarks.{program}",
            description=description,
            allow_abbrev=False,
            formatter_class=_ShowDefaults,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(" ".join(message.split()).removeprefix("argument "))


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_ints(text: str) -> tuple[int, ...]:
    """Numbers separated by commas, in ascending order and without repetition."""
    return tuple(sorted({positive_int(part.strip()) for part in text.split(",")}))


def positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def positive_numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas, in ascending order and without repetition."""
    return tuple(sorted({positive_number(part.strip()) for part in text.split(",")}))


def fraction(text: str) -> float:
    number = positive_number(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1")
    return number


def latency_and_rate(text: str) -> tuple[float, float]:
    """What a network is: microseconds, and Gbit/s."""
    try:
        latency_us, gigabits = (float(part) for part in text.split(","))
    except ValueError:
        latency_us = gigabits = 0.0
    if not (0 < latency_us < math.inf and 0 < gigabits < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a latency in µs and a rate in Gbit/s, such as 20,10")
    return latency_us, gigabits


def names(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names, separated by commas, in the order given. Raises ConfigError for one that is not `known`."""
    given = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    for name in given:
        if name not in known:
            raise ConfigError(f"{flag}: unknown value {name!r}; choose from {', '.join(known)}")
    return given


def check_writable(flag: str, path: Path | None) -> None:
    """Raise ConfigError where the file's folder does not exist: better before an hour of measuring than after it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{flag} {path}: name a file in a folder that exists")


def check_plotting(flag: str, wanted: object) -> None:
    """Raise ConfigError where a picture is wanted, so that `wanted` is not None, and nothing is there to draw it."""
    if wanted is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{flag} needs matplotlib: pip install 'allreduce_sgd[report]'")
