"""Whatever flags and TOML files say, reading them gives a configuration or a mistake told in one line."""

import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st

from allreduce_sgd.command_line import parse, read_toml
from allreduce_sgd.config import config_from, options, to_toml
from tests.fuzz.damage import bounded_memory, damaged, fuzz, refuses_in_one_line, unusual_text

OPTIONS = {each.name: each for each in options()}
NAMES = sorted(OPTIONS)
COMPLETE = to_toml(config_from({})).encode()

names = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES).map(lambda name: name.replace("-", "_")))
words = st.one_of(
    unusual_text(),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from([choice for each in OPTIONS.values() for choice in each.choices or ()]),
)
scalars: st.SearchStrategy[Any] = st.one_of(
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.booleans(),
    words.filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text)),
    st.dates(),
    st.times(),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
tables = st.dictionaries(st.one_of(names, unusual_text()), values, max_size=4)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def consistent(flags: list[str]) -> None:
    """Parse; where that succeeds, the configuration must be one that its own file gives again."""
    config, explicit = parse(flags)
    assert explicit <= set(NAMES)
    assert all(not isinstance(value, float) or math.isfinite(value) for value in config.flat().values())
    to_toml(config).encode("utf-8")


@fuzz(80)
@given(st.lists(st.one_of(names.map(lambda name: f"--{name}"), words), max_size=6))
@example(["--seed", "9" * 5000])
@example(["--output", "a\0b"])
@example(["--config", "a\0b"])
@example(["--resume", "a\0b"])
@example(["--data-dir", "\udcff"])
@example(["--dataset", "a\u2028b"])
@example(["--config", "a" * 5000])
@example(["--resume", "a" * 5000])
@example(["--dataset", "b" * 5000])
@example(["--" + "c" * 5000])
@example(["d" * 5000])
@example(["--lr", "e" * 5000])
@example(["--lr\n", "1"])
@example(["--\udcff"])
@example(["--strategy", "\x1b[2J"])
def test_any_flags(flags: list[str]) -> None:
    # --help and --version are not among the names.
    refuses_in_one_line(lambda: consistent(flags))


@fuzz(120)
@given(names, words)
def test_any_value_of_any_flag(name: str, text: str) -> None:
    refuses_in_one_line(lambda: consistent([f"--{name}={text}"]))


@fuzz(80)
@given(tables)
@example({"lr": 10**400})
@example({"lr": -(10**400)})
@example({"lr": math.nan})
@example({"seed": True})
@example({"output": "a\0b"})
@example({"dataset": "a\x85b"})
@example({"a" * 5000: 1})
@example({"a\nb": 1})
@example({"dataset": {"lr": 1}})
@example({"dataset": [["mnist"]]})
@example({"epochs": "x" * 5000})
def test_any_table(tmp_path: Path, table: dict[str, Any]) -> None:
    path = tmp_path / "config.toml"
    try:
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
    except (UnicodeEncodeError, ValueError):
        # TOML has no half surrogate pairs, and Python writes no integer of more than 4300 digits.
        return
    refuses_in_one_line(lambda: consistent(["--config", str(path)]))


@fuzz(80)
@given(st.one_of(st.binary(max_size=200), damaged(COMPLETE, len(COMPLETE)), st.text(max_size=100).map(encoded)))
@example(b"lr = " + b"9" * 5000)
@example(b"a = " + b"[" * 5000)
@example(b"a = " + b"{a=" * 5000)
@example(b"a." * 5000 + b"a = 1")
@example(b"\xff\xfe")
@example(b'"\\u0000" = 1')
@example(b"lr = nan")
def test_any_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    refuses_in_one_line(lambda: config_from(read_toml(path, "--config")))


@pytest.mark.parametrize("name", ["folder", "missing/file"])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    assert refuses_in_one_line(lambda: read_toml(tmp_path / name, "--config"))


def test_a_long_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"# nothing\n" * 500_000 + b"lr = 0.1\n")
    with bounded_memory(256 << 20):
        assert read_toml(path, "--config") == {"lr": 0.1}
