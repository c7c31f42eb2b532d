"""The figures of a report: what they are labelled with, and that a method looks alike in all of them."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.hyperbola import Fit
from benchmarks.report.batch_sizes import draw_hyperbola
from benchmarks.report.curves import QUANTITIES, draw_curves, has
from benchmarks.report.measures import measure, shown
from benchmarks.report.rows import draw_factors, draw_speed_up, draw_time_split, draw_to_target
from benchmarks.report.step_times import draw_step, parts_of
from benchmarks.study.results import Run, Study
from tests.benchmarks.synthetic_study import HEAD, STEPS, TARGET, study_runs

UNITS = r"\((s|MB, 10⁶ bytes|thousands|times|ms|samples)\)|times that of"
FIT = Fit(12.0, 120.0, (8.0, 15.0), (0.0, math.inf), 0.1, n=3, missed=1, batches=(16, 256), draws=np.empty((0, 2)))


@pytest.fixture
def study() -> Study:
    return Study(HEAD, tuple(study_runs()))


def test_every_figure_has_units_and_a_legend_with_n(study: Study) -> None:
    cells = measure(study)
    rivals = [each for each in cells if each.cell.contender != "serial"]
    figures = [draw_curves(cells, quantity, TARGET) for quantity in QUANTITIES]
    figures += [draw_to_target(cells, quantity) for quantity in QUANTITIES[:2]]
    figures += [draw_speed_up(rivals), draw_factors(rivals), draw_time_split(cells), draw_step("mlp", STEPS)]
    figures.append(draw_hyperbola([(16, 100.0), (64, 40.0), (256, 20.0), (256, math.inf)], FIT, [-1.0, 50.0, 90.0]))
    for figure in figures:
        legend = figure.legends[0]
        words = " ".join([legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())])
        assert re.search(r"n = \d", words)
        assert re.search(
            r"\((s|MB, 10⁶ bytes|thousands|times|ms|samples)\)|times that of", figure.axes[-1].get_xlabel()
        )
        assert figure.axes[0].get_title()


def test_curves_look_alike_in_the_figures_of_all_quantities(study: Study) -> None:
    cells = measure(study)
    looks = []
    for quantity in QUANTITIES:
        legend = draw_curves(cells, quantity, TARGET).legends[0]
        lines = zip(legend.get_texts(), legend.get_lines(), strict=True)
        looks.append({text.get_text(): (line.get_color(), line.get_marker()) for text, line in lines})
    assert len(looks[2]) < len(looks[0])
    assert looks[2].items() <= looks[0].items() == looks[1].items()


@pytest.mark.parametrize("ranks", [1, 2], ids=["all", "those that send"])
def test_curves_that_never_come_near_the_target_are_seen_whole(study: Study, ranks: int) -> None:
    def poor(run: Run) -> Run:
        evaluations = tuple(replace(each, test_accuracy=each.test_accuracy / 3) for each in run.evaluations)
        return replace(run, reached=False, evaluations=evaluations) if run.cell.ranks >= ranks else run

    cells = measure(Study(HEAD, tuple(map(poor, study.runs))))
    for quantity in QUANTITIES:
        axes = draw_curves(cells, quantity, TARGET).axes[0]
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        drawn = [each for each in cells if has(each, quantity) and each.cell.ranks >= ranks]
        assert drawn
        for point in (point for each in drawn for run in each.runs for point in run.evaluations):
            assert left <= quantity.scale * getattr(point, quantity.field) <= right
            assert low <= point.test_accuracy <= high


def test_more_cells_than_styles_show_the_soonest_batch_of_each_method(study: Study) -> None:
    cells = measure(study)
    assert shown(cells, 8) == cells
    names = {each.name for each in shown(cells, 5)}
    assert names == {each.name for each in cells} - {"serial, batch 1", "serial, batch 16", "sync, 2 ranks, batch 256"}


def test_torchs_waiting_is_what_its_backward_pass_takes_beyond_that_without_communication() -> None:
    assert parts_of(STEPS[1], STEPS)["exposed communication"] == 0.0005
    parts = parts_of(STEPS[2], STEPS)
    assert (parts["backward"], parts["exposed communication"]) == pytest.approx((0.004, 0.003))
