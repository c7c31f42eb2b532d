"""The course of a sweep, and what it suggests."""

import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest

from allreduce_sgd.probes import lr_finder_report
from allreduce_sgd.probes.lr_finder import Sweep, rates, smoothed


def test_rates_rise_by_one_factor() -> None:
    planned = rates(8)
    assert [planned[0], planned[-1]] == pytest.approx([1e-6, 10.0])
    assert [after / before for before, after in itertools.pairwise(planned)] == pytest.approx([10.0] * 7)


def test_smoothing_is_free_of_the_bias_of_its_start() -> None:
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    losses = [3.0, 1.0, 4.0, 1.0]
    for count, value in enumerate(smoothed(losses), 1):
        weights = [0.9**age for age in range(count)]
        mean = sum(w * loss for w, loss in zip(weights, reversed(losses[:count]), strict=True)) / sum(weights)
        assert value == pytest.approx(mean)


def test_suggestions_of_a_known_curve() -> None:
    # Of losses whose smoothed course is a sigmoid in the logarithm of the rate, steepest at 0.01, then diverges.
    tried = rates(141)
    course = [2 / (1 + (rate / 0.01) ** 2) + (rate / 1.0) ** 4 for rate in tried]
    kept, losses = 0.0, []
    for step, value in enumerate(course, 1):
        total = value * (1 - 0.9**step)
        losses.append((total - 0.9 * kept) / 0.1)
        kept = total
    sweep = Sweep(tried, losses, True)
    assert sweep.smoothed == pytest.approx(course)
    assert sweep.steepest == pytest.approx(0.01, rel=0.15)
    lowest = tried[course.index(min(course))]
    assert sweep.tenth_of_lowest == pytest.approx(lowest / 10)


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [math.nan], [1.0, math.inf], []])
def test_where_the_loss_never_fell_nothing_is_suggested(losses: list[float]) -> None:
    sweep = Sweep(rates(10)[: len(losses)], losses, True)
    assert (sweep.steepest, sweep.tenth_of_lowest) == (None, None)


def test_files_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = rates(20)
    losses = [*(2 - 0.1 * step for step in range(15)), 3.0, math.nan]
    sweep = Sweep(tried[: len(losses)], losses, True)
    told = lr_finder_report.report_sweep(sweep, tmp_path)
    assert "17 learning rates tried, up to 0.78" in told
    assert "where the loss diverged" in told
    written = json.loads((tmp_path / "lr-finder.json").read_text())
    assert written["suggestions"]["steepest"] == sweep.steepest
    assert written["losses"][-1] is None
    assert (tmp_path / "lr-finder.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    bare = tmp_path / "bare"
    bare.mkdir()
    told = lr_finder_report.report_sweep(sweep, bare)
    assert "lr-finder.png is left out: it needs matplotlib" in told
    assert [path.name for path in bare.iterdir()] == ["lr-finder.json"]
