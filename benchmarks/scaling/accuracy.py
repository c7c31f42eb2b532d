"""How many steps a target takes: from the hyperbola of batch sizes, or as runs of that many ranks really took.

Steps of synchronous SGD depend on the global batch alone, S = S_min (1 + B_crit / B) (McCandlish et al. 2018,
arXiv 1812.06162; `benchmarks.hyperbola`), whose constants are given or fitted to a study. Where the study has runs of
this very strategy, number of ranks and batch, their median counts: ranks that shared cores took as many steps as they
would have with a core each. For local and delayed SGD without such runs the steps of synchronous SGD with the same
global batch are taken, which they can only exceed: what is predicted then is the least time, and marked so.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from allreduce_sgd.errors import ConfigError
from benchmarks.hyperbola import fit_hyperbola, points_of
from benchmarks.study.results import read_study

__all__ = ["Accuracy", "Steps", "from_study"]

_Key = tuple[str, int, int, int]


@dataclass(frozen=True)
class Steps:
    """`basis` is measured, hyperbola, or at least: the hyperbola of synchronous SGD for another strategy."""

    count: float
    basis: str


@dataclass(frozen=True)
class Accuracy:
    """`measured`: the median steps by (strategy, period, ranks, global batch), infinite where most runs missed the
    target; the period is 1 for strategies that have none."""

    s_min: float
    b_crit: float
    source: str
    measured: Mapping[_Key, float] = field(default_factory=lambda: MappingProxyType({}))

    def steps(self, strategy: str, period: int, ranks: int, batch: float) -> Steps:
        """Return the steps to the target with `batch` samples of all ranks together in each."""
        found = self.measured.get((strategy, period, ranks, round(batch)))
        if found is not None:
            return Steps(found, "measured")
        count = self.s_min * (1 + self.b_crit / batch)
        return Steps(count, "hyperbola" if strategy == "sync" else "at least")


def from_study(flag: str, path: Path) -> Accuracy:
    """Fit the hyperbola to a study's synchronous runs. Raises ConfigError where it cannot be."""
    study = read_study(path)
    try:
        fit = fit_hyperbola(points_of(study))
    except ValueError as problem:
        raise ConfigError(f"{flag} {path}: {problem}") from problem
    groups: dict[_Key, list[float]] = {}
    for run in study.runs:
        cell = run.cell
        if run.phase == "measured" and cell.contender == "allreduce_sgd" and cell.compression == "none":
            period = int(dict(cell.flags).get("period", 1)) if cell.strategy == "local" else 1
            groups.setdefault((cell.strategy, period, cell.ranks, cell.global_batch_size), []).append(run.steps)
    measured = {key: statistics.median_low(steps) for key, steps in groups.items()}
    target = f"{100 * study.target_accuracy:g} % of study {study.name}"
    source = f"{target}: S_min {fit.s_min:.4g}, B_crit {fit.b_crit:.4g}, {fit.n} runs"
    return Accuracy(fit.s_min, fit.b_crit, source, MappingProxyType(measured))
