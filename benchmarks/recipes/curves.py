"""Batch size, learning rate and momentum: the curves of `benchmarks.course`, with claims about them."""

from collections.abc import Mapping
from typing import Any

from benchmarks.course.figures import FIGURES
from benchmarks.course.runs import Course, Job
from benchmarks.recipes.measures import over_last_epoch
from benchmarks.recipes.recipe import Claim, Recipe, Scale, Side, claims_of

__all__ = ["CURVES"]

_FIGURES = ("batch", "lr", "momentum")
_LOSS = over_last_epoch("training loss of the last epoch", "loss")


def _cases(scale: Scale) -> Mapping[str, Job]:
    return {series: job for name in _FIGURES for series, job in FIGURES[name].series.items()}


def _figures(cases: Mapping[str, Job], course: Course) -> dict[str, list[dict[str, Any]]]:
    return {name: FIGURES[name].rows(course) for name in _FIGURES}


CURVES = Recipe(
    title="Batch size, learning rate and momentum",
    expect=(
        "After the same number of samples a small mini-batch has made more steps than a large one, and with the same "
        "learning rate it is further down. A learning rate that is too small wastes steps; one that is too large steps "
        "over the minimum. Momentum m adds up past gradients to about 1/(1 - m) times one of them, so that with the "
        "same small rate it goes faster."
    ),
    scales={"quick": Scale(3), "digits": Scale(20), "": Scale(5)},
    cases=_cases,
    figures=_figures,
    findings=claims_of(
        Claim("Batch 16 is further down than batch 256", Side("batch 16", _LOSS), Side("batch 256", _LOSS)),
        Claim("A rate of 0.1 is further down than one of 0.003", Side("η = 0.1", _LOSS), Side("η = 0.003", _LOSS)),
        Claim("A rate of 1 is too large: 0.1 is further down", Side("η = 0.1", _LOSS), Side("η = 1", _LOSS)),
        Claim("Momentum 0.9 is further down than none", Side("momentum 0.9", _LOSS), Side("momentum 0", _LOSS)),
    ),
)
