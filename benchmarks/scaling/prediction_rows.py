"""The rows of predictions: step time, samples per second, efficiency and speed-up to accuracy, by number of ranks.

Weak scaling keeps the batch of a rank, strong scaling that of all ranks. Speed-up is samples per second over those of
one rank with that batch, and scaling efficiency is speed-up ÷ ranks. Speed-up to accuracy is over one rank at the batch
that is best for it, and is hardware × statistical efficiency: samples per second over the baseline's × samples to the
target of the baseline over those of this row. Where steps come from a study's fit, the range of seconds is that of its
95 % interval.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.scaling.accuracy import SYNCHRONOUS, Accuracy, Method
from benchmarks.scaling.compute import compute_at
from benchmarks.scaling.profile import Profile
from benchmarks.scaling.reductions import Reductions
from benchmarks.scaling.stepping import Plan, step_time
from benchmarks.scaling.stragglers import Stragglers

__all__ = ["Baseline", "Predictor", "Scaling"]

Scaling = Literal["weak", "strong"]

_BASELINE_BATCHES = tuple(1 << power for power in range(14))


@dataclass(frozen=True)
class Baseline:
    """One rank alone, at the batch with which it reaches the target soonest; `beyond` as in Steps."""

    batch_size: int
    seconds: float
    samples: float
    beyond: bool

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds


@dataclass(frozen=True)
class Predictor:
    """What all rows of a table share. `accuracy` None: nothing is known of the steps to a target."""

    profile: Profile
    model: str
    reductions: Reductions
    network: str
    stragglers: Stragglers
    accuracy: Accuracy | None

    def baseline(self) -> Baseline | None:
        """Return one rank's best time to the target among batch sizes of powers of two.

        Below the smallest and beyond the largest measured batch, computing is extrapolated.
        """
        if self.accuracy is None:
            return None
        found = []
        for batch in _BASELINE_BATCHES:
            steps = self.accuracy.steps(SYNCHRONOUS, 1, batch)
            seconds = steps.count * compute_at(self.profile.computes, self.model, batch).seconds
            found.append(Baseline(batch, seconds, steps.count * batch, steps.beyond))
        return min(found, key=lambda each: each.seconds)

    def row(self, ranks: int, batch_per_rank: float, plan: Plan, reference_batch: float) -> dict[str, Any]:
        """Return one prediction; samples per second of one rank with `reference_batch` are what ranks scale from."""
        compute = compute_at(self.profile.computes, self.model, batch_per_rank)
        handling = self.profile.handling
        step = step_time(compute, ranks, self.reductions, plan, self.stragglers, handling)
        rate = ranks * batch_per_rank / step.seconds
        alone = reference_batch / compute_at(self.profile.computes, self.model, reference_batch).seconds
        row: dict[str, Any] = {
            "kind": "prediction",
            "simulated": True,
            "model": self.model,
            "network": self.network,
            "plan": plan.label,
            "strategy": plan.strategy,
            "period": plan.period,
            "delay": plan.delay,
            "codec": plan.codec.name,
            "codec_time": "measured" if plan.codec.measured else "assumed",
            "bucket_mb": plan.bucket_mb,
            "stragglers": self.stragglers.describe(),
            "ranks": ranks,
            "batch_per_rank": batch_per_rank,
            "global_batch": ranks * batch_per_rank,
            **step.fields(),
            "samples_per_second": rate,
            "speed_up": rate / alone,
            "scaling_efficiency": rate / alone / ranks,
        }
        return row | self._to_target(row, Method(plan.strategy, plan.period, plan.delay, plan.codec.name))

    def table(self, numbers: Sequence[int], plan: Plan, scaling: Scaling, batch: float) -> Iterator[dict[str, Any]]:
        """Yield a row for each number of ranks that has at least a sample for each; `batch` of a rank, or of all."""
        for ranks in numbers:
            per_rank = batch if scaling == "weak" else batch / ranks
            if per_rank >= 1:
                yield {**self.row(ranks, per_rank, plan, batch), "scaling": scaling}

    def _to_target(self, row: dict[str, Any], method: Method) -> dict[str, Any]:
        baseline = self.baseline()
        if self.accuracy is None or baseline is None:
            return {}
        batch, rate = row["global_batch"], row["samples_per_second"]
        steps = self.accuracy.steps(method, row["ranks"], batch)
        told = {"target": self.accuracy.source, "steps_basis": steps.basis, "beyond_study": steps.beyond}
        if not math.isfinite(steps.count):
            return {**told, "steps_to_target": None, "seconds_to_target": None}
        seconds = steps.count * row["step_seconds"]
        return {
            **told,
            "steps_to_target": steps.count,
            "seconds_to_target": seconds,
            "seconds_to_target_range": [each * row["step_seconds"] for each in (steps.low, steps.high)],
            "rank_hours": row["ranks"] * seconds / 3600,
            "gigabytes_sent": row["bytes_sent"] * steps.count / 1e9,
            "baseline_batch": baseline.batch_size,
            "baseline_seconds": baseline.seconds,
            "baseline_beyond_study": baseline.beyond,
            "speed_up_to_accuracy": baseline.seconds / seconds,
            "hardware_efficiency": rate / baseline.samples_per_second,
            "statistical_efficiency": baseline.samples / (steps.count * batch),
        }
