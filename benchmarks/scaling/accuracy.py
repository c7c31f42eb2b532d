"""How many steps a target takes: from the hyperbola of batch sizes, or as runs of that very method took.

Steps of synchronous SGD depend on the global batch alone, S = S_min (1 + B_crit / B) (McCandlish et al. 2018,
arXiv 1812.06162; `benchmarks.hyperbola`), whose constants are given or fitted to all synchronous runs of a study. Both
the ranks and the one rank that they are compared with stand on that curve: a median of a few runs here and the curve
there would take what is chance for a speed-up. For another strategy or a codec the runs of a study count, at the same
number of ranks and batch; ranks that shared cores took as many steps as they would have with a core each. Without such
runs the steps of synchronous SGD are assumed, and marked so: as a rule it takes more, but it may take fewer.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.strategies.options import PERIODS
from benchmarks.hyperbola import Fit, fit_hyperbola, points_of
from benchmarks.study.results import Cell, read_study
from benchmarks.table import format_number

__all__ = ["SYNCHRONOUS", "Accuracy", "Method", "Steps", "from_study"]


@dataclass(frozen=True)
class Method:
    """What steps depend on beside the batch and the ranks; the period is 1 for strategies that have none."""

    strategy: str = "sync"
    period: int = 1
    delay: int = 0
    codec: str = "none"


SYNCHRONOUS = Method()
_DATASET = "fashion-mnist"
"""Workloads have inputs of its size."""


@dataclass(frozen=True)
class Steps:
    """`basis` is hyperbola; measured, the median of runs; or assumed: those of synchronous SGD for another method.

    `low` and `high` end the 95 % interval of the hyperbola's fit. `beyond`: the fit knows no batch that small or large.
    """

    count: float
    basis: Literal["hyperbola", "measured", "assumed"]
    low: float
    high: float
    beyond: bool = False


@dataclass(frozen=True)
class Accuracy:
    """`measured`: the median steps by method, ranks and global batch, infinite where most runs missed the target.

    `fit` is where the constants come from, and `trained` what was trained for it, as workloads are called; None where
    they were given.
    """

    s_min: float
    b_crit: float
    source: str
    measured: Mapping[tuple[Method, int, int], float] = field(default_factory=lambda: MappingProxyType({}))
    fit: Fit | None = None
    trained: str | None = None

    def steps(self, method: Method, ranks: int, batch: float) -> Steps:
        """Return the steps to the target with `batch` samples of all ranks together in each."""
        found = self.measured.get((method, ranks, round(batch)))
        if found is not None and method != SYNCHRONOUS:
            return Steps(found, "measured", found, found)
        basis: Literal["hyperbola", "assumed"] = "hyperbola" if method == SYNCHRONOUS else "assumed"
        count = self.s_min * (1 + self.b_crit / batch)
        if self.fit is None:
            return Steps(count, basis, count, count)
        low, high = self.fit.steps_range(batch)
        smallest, largest = self.fit.batches
        return Steps(count, basis, low, high, beyond=not smallest <= batch <= largest)


def from_study(flag: str, path: Path) -> Accuracy:
    """Fit the hyperbola to a study's synchronous runs. Raises ConfigError where it cannot be."""
    try:
        study = read_study(path)
    except ConfigError as problem:
        raise ConfigError(f"{flag} {problem}") from problem
    try:
        fit = fit_hyperbola(points_of(study))
    except ValueError as problem:
        raise ConfigError(f"{flag} {path}: {problem}") from problem
    groups: dict[tuple[Method, int, int], list[float]] = {}
    for run in study.runs:
        method = _method_of(run.cell)
        if run.phase == "measured" and run.cell.contender == "allreduce_sgd" and method is not None:
            groups.setdefault((method, run.cell.ranks, run.cell.global_batch_size), []).append(run.steps)
    measured = {key: statistics.median(steps) for key, steps in groups.items()}
    (s_low, s_high), (b_low, b_high) = fit.s_min_range, fit.b_crit_range
    smallest, largest = fit.batches
    source = (
        f"{100 * study.target_accuracy:g} % of study {study.name}: "
        f"S_min {fit.s_min:.4g} [{format_number(s_low)}–{format_number(s_high)}], "
        f"B_crit {fit.b_crit:.4g} [{format_number(b_low)}–{format_number(b_high)}], "
        f"{fit.n} runs, {fit.missed} more missed it, batches {smallest:,} to {largest:,}"
    )
    return Accuracy(fit.s_min, fit.b_crit, source, MappingProxyType(measured), fit, _trained(study.head["spec"]))


def _trained(spec: Mapping[str, Any]) -> str:
    """Return the study's model as a workload is called where there is such a one, else a description."""
    model, hidden, dataset = (str(spec.get(name)) for name in ("model", "hidden", "dataset"))
    if dataset != _DATASET:
        return f"{model} on {dataset}"
    widths = hidden.split(",")
    return f"mlp{widths[0]}" if model == "mlp" and len(widths) == 2 and widths[0] == widths[1] else model


def _method_of(cell: Cell) -> Method | None:
    """Return the method of a cell; None where its flags make another of it."""
    flags = dict(cell.flags)
    period = int(flags.pop("period", PERIODS.get(cell.strategy, 1)))
    delay = int(flags.pop("delay", 1 if cell.strategy == "delayed" else 0))
    return None if flags else Method(cell.strategy, period, delay, cell.compression)
