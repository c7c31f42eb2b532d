"""Flags and TOML files to a configuration. Every mistake is a ConfigError of one line that names the flag or file."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from allreduce_sgd.config import Config, Option, check_text, config_from, options
from allreduce_sgd.errors import ConfigError, quoted
from allreduce_sgd.run_folder import resumed_folder
from allreduce_sgd.toml_file import load_toml

__all__ = ["Flags", "build_parser", "parse", "read_toml", "words"]

Flags = Mapping[str, str | int | float | bool]
"""Options of the trainer by name; True and False stand for a flag and its --no- form."""

_DESCRIPTION = """\
Train a model with data-parallel SGD on all ranks that the launcher started:

  mpirun -np 4 python -m allreduce_sgd.train --dataset fashion-mnist --epochs 10

Without mpirun it trains on one rank, without flags on a small data set in seconds. A run writes config.toml,
metrics.jsonl, summary.json and checkpoints into its --output folder."""
_EPILOG = """\
Every flag may stand in a TOML file given by --config, under its own name (batch-size = 64); flags override the file.
SIGUSR1 to any rank has all write a checkpoint at the next step and stop, to go on with --resume; so has SIGTERM, within
--grace-seconds.
Exit status: 0 done, 1 failed, 2 bad arguments or configuration, 75 stopped by a signal after a
checkpoint."""


_LONGEST_NAME = 100
_LONGEST_MISTAKE = 500


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split()).removeprefix("argument ")
        raise ConfigError(text if len(text) <= _LONGEST_MISTAKE else f"{text[:_LONGEST_MISTAKE]}...")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: a flag per option, grouped as the option dataclasses are."""
    parser = _Parser(
        prog="allreduce-sgd",
        usage="mpirun -np N python -m allreduce_sgd.train [--config FILE] [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    parser.add_argument("--config", metavar="FILE", help="TOML file with options")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for each in options():
        if each.group not in groups:
            groups[each.group] = parser.add_argument_group(each.title)
        group = groups[each.group]
        help_text = _help(each).replace("%", "%%")
        if each.kind is bool:
            group.add_argument(f"--{each.name}", action=argparse.BooleanOptionalAction, help=help_text)
        else:
            metavar = each.metavar or ("NAME" if each.choices else {int: "N", float: "X", str: "TEXT"}[each.kind])
            group.add_argument(f"--{each.name}", metavar=metavar, help=help_text)
    return parser


def parse(arguments: Sequence[str]) -> tuple[Config, frozenset[str]]:
    """Return the configuration and the names of the options that the arguments (not a file) set.

    Without --resume: defaults, then the file of --config, then flags. With it: the resumed run's configuration, then
    flags. Raises ConfigError.
    """
    given, unknown = build_parser().parse_known_args(arguments)
    known = {each.name: each for each in options()}
    if unknown:
        raise ConfigError(_unknown_flag(unknown[0], known))
    flags = {
        name.replace("_", "-"): _from_text(known[name.replace("_", "-")], text)
        for name, text in vars(given).items()
        if name != "config"
    }
    file = getattr(given, "config", None)
    if file is not None:
        check_text(file, "--config")
    values: dict[str, Any] = {}
    if "resume" in flags:
        if file is not None:
            raise ConfigError("--config and --resume: a resumed run has its own configuration; override it by flags")
        values = read_toml(resumed_folder(flags["resume"]) / "config.toml", "--resume")
    elif file is not None:
        values = read_toml(Path(file), "--config")
    for group in (("epochs", "steps"), ("batch-size", "global-batch-size", "full-batch")):
        for flag in group:
            if flags.get(flag):
                for other in group:
                    if other not in flags:
                        values.pop(other, None)
    return config_from({**values, **flags}), frozenset(flags)


def words(flags: Flags) -> list[str]:
    """Return the flags as words of a command line."""
    line = []
    for name, value in flags.items():
        match value:
            case True:
                line += [f"--{name}"]
            case False:
                line += [f"--no-{name}"]
            case _:
                line += [f"--{name}", str(value)]
    return line


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """Return the checked options of a TOML file by name."""
    table = load_toml(path, flag)
    known = {each.name: each for each in options()}
    values = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in known:
            raise ConfigError(f"{flag}: {path}: unknown option {quoted(key)}{_suggestion(name, known)}")
        if isinstance(value, dict | list):
            raise ConfigError(f"{flag}: {path}: {key}: options stand flat in the file, each with one value")
        values[name] = known[name].check(value, str(path))
    return values


def _from_text(each: Option, text: Any) -> Any:
    value = text
    if each.kind in (int, float):
        try:
            value = each.kind(text)
        except ValueError:
            wanted = "a whole number" if each.kind is int else "a number"
            raise ConfigError(f"--{each.name}: {quoted(text)} is not {wanted}") from None
    return each.check(value, "")


def _help(each: Option) -> str:
    choices = f" [{', '.join(each.choices)}]" if each.choices else ""
    if each.default is None or (each.kind is bool and each.default is False):
        return each.help + choices
    default = f"{each.default:g}" if each.kind is float else each.default
    return f"{each.help}{choices} (default: {default})"


def _unknown_flag(flag: str, known: Mapping[str, Option]) -> str:
    if not flag.startswith("--"):
        return f"unexpected argument {quoted(flag)}; options are written --name value (see --help)"
    name = flag[2:].split("=")[0]
    told = f"--{name}" if name.isprintable() and len(name) < _LONGEST_NAME else quoted(f"--{name}")
    return f"unknown flag {told}{_suggestion(name, known, '--')}"


def _suggestion(name: str, known: Mapping[str, Option], dashes: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {dashes}{close[0]}?" if close else "; --help lists all of them"


def _version() -> str:
    try:
        return version("allreduce-sgd")
    except PackageNotFoundError:
        return "(not installed)"
