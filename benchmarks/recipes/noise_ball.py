"""The noise ball of SGD against batch size: the figure of `benchmarks.course`, with claims about it.

It trains no network, and takes no data: the loss is a quadratic whose noise is known, stepped on by the project's
samplers and its synchronous strategy (see course/noise_ball.py).
"""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.course.noise_ball import formula, noise_ball
from benchmarks.course.runs import Course, Job
from benchmarks.recipes.recipe import Finding, Recipe, Scale

__all__ = ["NOISE_BALL"]

_CHAINS_PER_SEED = 2
_TOLERANCE = 0.1
_SERIES = {"with replacement": False, "random subsets": True}


def _no_cases(scale: Scale) -> Mapping[str, Job]:
    return {}


def _figures(cases: Mapping[str, Job], course: Course) -> Mapping[str, list[dict[str, Any]]]:
    return {"noise_ball": noise_ball(_CHAINS_PER_SEED * course.seeds)}


def findings_of(rows: list[dict[str, Any]]) -> list[Finding]:
    """Return what the figure's rows say of the claims; a pair of numbers for each batch size they are about."""
    by_name = {row["series"]: row for row in rows}
    found = [
        Finding(
            f"{name.capitalize()}, the formula holds within {100 * _TOLERANCE:g} %",
            "|measured / formula − 1|, for each batch",
            f"{_TOLERANCE:g}",
            tuple(
                (abs(y / formula(batch, subsets) - 1), _TOLERANCE)
                for batch, y in zip(by_name[name]["x"], by_name[name]["y"], strict=True)
            ),
        )
        for name, subsets in _SERIES.items()
    ]
    replaced, permuted = by_name["with replacement"], by_name["permutation per epoch"]
    (first, *_, last), (high, *_, low) = replaced["x"], replaced["y"]
    slope = math.log(low / high) / math.log(last / first)
    return [
        *found,
        Finding(
            "With replacement, twice the batch leaves half the ball",
            "|slope + 1| of both axes' logarithms",
            f"{_TOLERANCE:g}",
            ((abs(slope + 1), _TOLERANCE),),
        ),
        Finding(
            "A permutation of all samples keeps it nearer than samples drawn with replacement",
            "E x², permutation per epoch, for each batch",
            "E x², with replacement",
            tuple(zip(permuted["y"], replaced["y"], strict=True)),
        ),
    ]


def _findings(cases: Mapping[str, Job], course: Course, figures: Mapping[str, list[dict[str, Any]]]) -> list[Finding]:
    return findings_of(figures["noise_ball"])


NOISE_BALL = Recipe(
    title="The noise ball against batch size",
    expect=(
        "With a constant learning rate SGD does not come to rest: near the minimum the gradient of a mini-batch is "
        "mostly noise, and the weights stay in a ball around it. Noise of independent samples averages out, so a batch "
        "of b leaves 1/b of the variance: E x² = η²σ²/(b·a(2 − a)) on a quadratic of curvature λ, a = ηλ. Samples "
        "drawn without replacement leave less, and a permutation per epoch less still, as errors cancel within it."
    ),
    scales={"quick": Scale(1), "": Scale(1)},
    cases=_no_cases,
    figures=_figures,
    findings=_findings,
)
