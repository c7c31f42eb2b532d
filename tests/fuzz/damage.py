"""What the fuzz tests of this folder share: how many examples, damaged bytes, and what may come of them.

Examples are the same in every run. `ALLREDUCE_SGD_FUZZ=100` makes a hundred times as many, chosen at random.
"""

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from allreduce_sgd.errors import ConfigError

__all__ = ["bounded_memory", "damaged", "fuzz", "refuses_in_one_line", "unusual_text"]

# Names of files may have 4096 characters, and stand in some texts twice.
_LONGEST_TEXT = 10_000
_ADDRESS_SPACE_BYTES = 8 << 30
_FACTOR = int(os.environ.get("ALLREDUCE_SGD_FUZZ", "1"))


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a test of hypothesis: so many examples, whatever time each takes."""
    return settings(
        max_examples=examples * _FACTOR,
        derandomize=_FACTOR == 1,
        database=None,
        deadline=None,
        # Fixtures here only give a folder, which every example writes anew.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def refuses_in_one_line(attempt: Callable[[], Any]) -> bool:
    """Say whether `attempt` raised ConfigError, of one line that a terminal can show; any other exception passes."""
    try:
        attempt()
    except ConfigError as problem:
        text = str(problem)
        assert text.strip()
        assert len(text.splitlines()) == 1, repr(text)
        assert len(text) <= _LONGEST_TEXT, f"{len(text)} characters: {text[:200]!r}"
        text.encode("utf-8")
        return True
    return False


@contextlib.contextmanager
def bounded_memory(most_bytes: int) -> Iterator[None]:
    """Fail where the body has this process use more than `most_bytes` beyond what it used before.

    What is only asked for and never touched does not count, but is limited too, so that a mistake cannot hurt others.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    virtual_bytes = _status_bytes("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes + _ADDRESS_SPACE_BYTES, hard))
    # So that the peak is that of the body.
    Path("/proc/self/clear_refs").write_text("5")
    before_bytes = _status_bytes("VmRSS")
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    used_bytes = _status_bytes("VmHWM") - before_bytes
    assert used_bytes <= most_bytes, f"{used_bytes:,} bytes were used"


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise AssertionError(f"no {name} in /proc/self/status")


@st.composite
def damaged(draw: st.DrawFn, content: bytes, header_bytes: int = 128) -> bytes:
    """Bytes near `content`: some overwritten, mostly in the first `header_bytes`, cut off, cut out, put in or added."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # Headers are short and decide what the rest means.
        last = min(header_bytes, len(changed)) if draw(st.integers(0, 3)) else len(changed)
        position = draw(st.integers(0, max(0, last - 1)))
        match draw(st.sampled_from(("flip", "overwrite", "largest", "truncate", "cut", "insert", "append"))):
            case "flip" if changed:
                changed[position] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                piece = draw(st.binary(min_size=1, max_size=8))
                changed[position : position + len(piece)] = piece
            case "largest":
                width = draw(st.sampled_from((1, 2, 4, 8)))
                # As a length, in either order of bytes, signed and unsigned.
                piece = draw(st.sampled_from((b"\xff" * width, b"\x7f" + b"\xff" * (width - 1), b"\0" * width)))
                changed[position : position + width] = draw(st.sampled_from((piece, piece[::-1])))
            case "truncate":
                del changed[position:]
            case "cut":
                del changed[position : position + draw(st.integers(1, 64))]
            case "insert":
                changed[position:position] = draw(st.binary(min_size=1, max_size=64))
            case "append":
                changed += draw(st.binary(min_size=1, max_size=64))
    return bytes(changed)


def unusual_text() -> st.SearchStrategy[str]:
    """Text that has line breaks, NULs, half a surrogate pair, what a terminal obeys, or nothing."""
    lines = ["", " ", "\n", "\r", "\0", "\x1b[2J", "\u2028", "\udcff", "\U0001f600", "é", "%s", "{}", "..", "a" * 5000]
    numbers = ["-1", "0", "1e400", "nan", "inf", "9" * 25, "9" * 5000, "0x10", "1_0", "٣"]
    pieces = [*lines, *numbers, "true", "none", "sgd", "a:b"]
    mixed = st.lists(st.sampled_from(pieces), max_size=3).map("".join)
    return st.one_of(st.sampled_from(pieces), mixed, st.text(max_size=30))
