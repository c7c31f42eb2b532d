import argparse

import pytest

from benchmarks.message_sizes import format_size, message_sizes


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4K:32K", (4096, 8192, 16384, 32768)),
        ("4K:20K", (4096, 8192, 16384)),
        ("1M,4k,6000", (4096, 6000, 1 << 20)),
        ("64K:128K,96K,128KiB", (65536, 98304, 131072)),
    ],
)
def test_ranges_double_and_lists_are_sorted(text: str, sizes: tuple[int, ...]) -> None:
    assert message_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "0", "4X", "8K:4K", "4K:", "-4K", "1.5M", "4K,,8K"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        message_sizes(text)


def test_sizes_are_shown_in_the_largest_whole_unit() -> None:
    assert [format_size(size) for size in (4096, 6000, 3 << 20, 1 << 30)] == ["4 KiB", "6000 B", "3 MiB", "1 GiB"]
