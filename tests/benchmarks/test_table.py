import math

import pytest

from benchmarks.table import format_number, format_range, format_table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (0.0123456, "0.0123"),
        (-1.5, "-1.50"),
        (12.345, "12.3"),
        (4028, "4,028"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_a_range_shows_the_median_between_its_ends() -> None:
    assert format_range([3.0, 1.0, math.inf]) == "3.00 [1.00–∞]"
    assert format_range([2.0, 2.0]) == "2.00"
    assert format_range([1.0, math.inf, math.inf]) == "∞ [1.00–∞]"


def test_columns_are_aligned() -> None:
    assert format_table(["name", "s"], [["a", "1.00"], ["longer", "10.0"]]).splitlines() == [
        "name       s",
        "------  ----",
        "a       1.00",
        "longer  10.0",
    ]
