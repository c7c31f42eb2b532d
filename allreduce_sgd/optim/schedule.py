"""The learning rate over the run, one value per optimizer step.

Warm-up and decay as in Goyal et al. 2017 (arXiv 1706.02677), cosine as in Loshchilov and Hutter 2016 (arXiv
1608.03983) without restarts. Steps count optimizer steps, so the course does not depend on the number of ranks.
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from allreduce_sgd.optim.options import OptimizerOptions

__all__ = ["build_schedule", "factor"]


def build_schedule(options: OptimizerOptions, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Return the scheduler; call its `step` after each optimizer step."""
    return LambdaLR(optimizer, lambda step: factor(options.lr_schedule, step, total_steps, options.warmup_steps))


def factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Return what the learning rate is multiplied by at `step` (counted from 0) of `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case "linear":
            return max(0.0, 1 - done)
        case "step":
            return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        case _:
            return 1.0
