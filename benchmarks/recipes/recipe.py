"""What a recipe is: trainings to compare, curves to draw, and claims that are made before anything is trained.

A claim says that a number of one training is smaller than a number of another, or of the same. Both are read from the
runs' own files, seed by seed. It is "as expected" where it holds for every seed, and "not seen here" else.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.course.runs import Course, Job
from benchmarks.recipes.measures import Measure, curve

__all__ = ["Claim", "Curve", "Finding", "Recipe", "Scale", "Side", "claims_of", "curves_of"]

Rows = list[dict[str, Any]]
Cases = Mapping[str, Job]
Figures = Mapping[str, Rows]


@dataclass(frozen=True)
class Scale:
    """How large a recipe is on a data set. `train_samples` None: all of them."""

    epochs: int
    train_samples: int | None = None
    hidden: str = "512,512"


@dataclass(frozen=True)
class Finding:
    """A claim, and what was found: for each seed the number that is to be smaller, and the one to be larger.

    With `finite` an infinite number shows nothing, else it is larger than any other.
    """

    claim: str
    smaller: str
    larger: str
    pairs: tuple[tuple[float, float], ...]
    finite: bool = False

    @property
    def held(self) -> int:
        """For how many seeds the claim holds. A number that is none holds for no claim."""
        return sum(smaller < larger and (math.isfinite(larger) or not self.finite) for smaller, larger in self.pairs)

    @property
    def verdict(self) -> str:
        return "as expected" if self.held == len(self.pairs) else "not seen here"


@dataclass(frozen=True)
class Recipe:
    """An experiment. `expect` is told before it is run; of `scales` "quick" is for --quick, "" for other data sets.

    `cases` are the trainings by label, each run with every seed; `figures` the rows of each picture by its name.
    """

    title: str
    expect: str
    scales: Mapping[str, Scale]
    cases: Callable[[Scale], Cases]
    figures: Callable[[Cases, Course], Figures]
    findings: Callable[[Cases, Course, Figures], list[Finding]]

    def scale(self, dataset: str, quick: bool) -> Scale:
        """Return the recipe's size; with `quick` on any data set that of a first look."""
        return self.scales["quick" if quick else dataset if dataset in self.scales else ""]


@dataclass(frozen=True)
class Side:
    """One side of a claim: a number of the case of this label, times `factor`."""

    case: str
    measure: Measure
    factor: float = 1.0

    def told(self) -> str:
        times = "" if self.factor == 1 else f"{self.factor:g} × "
        return f"{times}{self.measure.name}, {self.case}"

    def of(self, folder: Path) -> float:
        return self.factor * self.measure.of(folder)


@dataclass(frozen=True)
class Claim:
    """`finite`: of runs that do not diverge; in other claims, diverging is what the larger side may do."""

    text: str
    smaller: Side
    larger: Side
    finite: bool = False


@dataclass(frozen=True)
class Curve:
    """A picture: a line for each case, of a column of metrics.jsonl against epochs."""

    name: str
    title: str
    event: str
    column: str
    label: str
    y_log: bool = False


def claims_of(*claims: Claim) -> Callable[[Cases, Course, Figures], list[Finding]]:
    """Return what finds out about the claims from the runs of a course."""

    def find(cases: Cases, course: Course, figures: Figures) -> list[Finding]:
        return [
            Finding(
                claim.text,
                claim.smaller.told(),
                claim.larger.told(),
                tuple(
                    (
                        claim.smaller.of(course.folder(cases[claim.smaller.case], seed)),
                        claim.larger.of(course.folder(cases[claim.larger.case], seed)),
                    )
                    for seed in range(course.seeds)
                ),
                claim.finite,
            )
            for claim in claims
        ]

    return find


def curves_of(*curves: Curve) -> Callable[[Cases, Course], Figures]:
    """Return what makes the rows of these pictures from the runs of a course."""

    def rows(cases: Cases, course: Course) -> Figures:
        return {each.name: [_row(each, label, course.folders(job)) for label, job in cases.items()] for each in curves}

    return rows


def _row(drawn: Curve, label: str, folders: Sequence[Path]) -> dict[str, Any]:
    return {
        "figure": drawn.name,
        "title": drawn.title,
        "series": label,
        **curve(folders, drawn.event, drawn.column),
        "x_label": "epochs",
        "y_label": drawn.label,
        "x_log": False,
        "y_log": drawn.y_log,
        "n": len(folders),
        "note": "median and range over seeds",
        "runs": [str(folder) for folder in folders],
    }
