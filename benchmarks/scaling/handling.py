"""What a step pays for handing gradients to the communicator, beyond computing and reducing each alone.

Three prices, all of the computing core or of the thread that reduces beside it:

- a hook           per parameter: measured alone (`benchmarks.step_hooks`)
- a byte           copied between gradients and buckets
- a bucket         handed over: waking the other thread, taking turns with it at the interpreter, being woken

The last two only show while ranks compute, so that they are fitted: both at least 0, by the least sum of relative
errors between the steps measured of the profile's own workloads and what the recursion of `stepping` makes of them.
They belong to the cores and not to the network: a profile keeps them when it predicts other networks and rank counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares  # type: ignore[import-untyped]

__all__ = ["NO_HANDLING", "Handling", "fit_handling"]

_STARTS = ((0.0, 0.0), (1e-4, 0.0), (0.0, 1e-10), (3e-4, 3e-10))
_BUCKET_SCALE_SECONDS, _BYTE_SCALE_SECONDS = 1e-4, 1e-10


@dataclass(frozen=True)
class Handling:
    """Seconds per parameter, per byte of gradients, and per bucket."""

    hook_seconds: float = 0.0
    seconds_per_byte: float = 0.0
    bucket_seconds: float = 0.0


NO_HANDLING = Handling()


def fit_handling(
    hook_seconds: float, predict: Sequence[Callable[[Handling], float]], seconds: Sequence[float]
) -> Handling:
    """Return the prices with which `predict[i]` comes nearest to `seconds[i]`, the measured step of workload i.

    Without measurements, hooks alone.
    """
    hooks = Handling(hook_seconds)
    if not seconds:
        return hooks

    def priced(prices: npt.NDArray[np.float64]) -> Handling:
        per_bucket, per_byte = (float(each) for each in prices)
        return replace(
            hooks, seconds_per_byte=per_byte * _BYTE_SCALE_SECONDS, bucket_seconds=per_bucket * _BUCKET_SCALE_SECONDS
        )

    def errors(prices: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        handling = priced(prices)
        return np.array([each(handling) / measured - 1 for each, measured in zip(predict, seconds, strict=True)])

    # Nearly the sum of absolute errors, which one disturbed workload does not decide; not convex, hence several starts.
    fits = [
        least_squares(
            errors,
            (per_bucket / _BUCKET_SCALE_SECONDS, per_byte / _BYTE_SCALE_SECONDS),
            bounds=(0, np.inf),
            loss="soft_l1",
            f_scale=0.02,
        )
        for per_bucket, per_byte in _STARTS
    ]
    return priced(min(fits, key=lambda fit: float(fit.cost)).x)
