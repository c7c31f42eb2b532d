"""Message sizes on the command line and in tables: "4K:128M" doubles from 4 KiB to 128 MiB, "4K,1M" are just those."""

import argparse
import re

__all__ = ["format_size", "message_sizes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def message_sizes(text: str) -> tuple[int, ...]:
    """Return bytes in ascending order, without repetition; ranges and single sizes are separated by commas."""
    found: set[int] = set()
    for part in text.split(","):
        low, colon, high = part.partition(":")
        size_bytes = _parse(low)
        last_bytes = _parse(high) if colon else size_bytes
        if last_bytes < size_bytes:
            raise argparse.ArgumentTypeError(f"{part!r}: the range ends below its beginning")
        while size_bytes <= last_bytes:
            found.add(size_bytes)
            size_bytes *= 2
    return tuple(sorted(found))


def format_size(size_bytes: int) -> str:
    """Return the size in the largest unit that it is a whole number of: "4 KiB", "6000 B"."""
    for unit in ("G", "M", "K"):
        if size_bytes and size_bytes % _UNITS[unit] == 0:
            return f"{size_bytes // _UNITS[unit]} {unit}iB"
    return f"{size_bytes} B"


def _parse(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]*)([KMG]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4K, 6000, 128M or 4K:128M")
    return int(match[1]) * _UNITS[match[2].upper()]
