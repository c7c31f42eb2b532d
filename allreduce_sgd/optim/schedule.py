"""The learning rate over the run, one value per optimizer step: a factor of the base rate.

Warm-up, decay in steps and linear scaling with the batch as in Goyal et al. 2017 (arXiv 1706.02677); square-root
scaling as in Krizhevsky 2014 (arXiv 1404.5997); cosine as in Loshchilov and Hutter 2016 (arXiv 1608.03983) without
restarts; polynomial as in You et al. 2017 (arXiv 1708.03888); inverse time, eta / (1 + decay t), as in Robbins and
Monro 1951, whose sums it satisfies. Steps count optimizer steps, so the course does not depend on the number of ranks.
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from allreduce_sgd.optim.options import OptimizerOptions

__all__ = ["batch_factor", "build_schedule", "factor"]

_BASE_BATCH = 256
_POWER = 2.0


def build_schedule(
    options: OptimizerOptions, optimizer: Optimizer, total_steps: int, global_batch_size: int = _BASE_BATCH
) -> LambdaLR:
    """Return the scheduler; call its `step` after each optimizer step. `global_batch_size`: the samples of a step."""
    scale = batch_factor(options, global_batch_size)
    return LambdaLR(optimizer, lambda step: scale * factor(options, step, total_steps))


def batch_factor(options: OptimizerOptions, global_batch_size: int) -> float:
    """Return what the learning rate is multiplied by for so many samples in a step, whatever the step."""
    ratio = global_batch_size / (options.lr_base_batch or _BASE_BATCH)
    match options.lr_scaling:
        case "linear":
            return ratio
        case "sqrt":
            return math.sqrt(ratio)
        case _:
            return 1.0


def factor(options: OptimizerOptions, step: int, total_steps: int) -> float:
    """Return what the learning rate is multiplied by at `step` (counted from 0) of `total_steps`."""
    warmup = options.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    steps, run = step - warmup, max(1, total_steps - warmup)
    left = max(0.0, 1 - steps / run)
    every = options.lr_decay_every
    decay = 0.1 if options.lr_decay is None else options.lr_decay
    match options.lr_schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, steps / run)))
        case "linear":
            return left
        case "polynomial":
            return left ** (_POWER if options.lr_power is None else options.lr_power)
        case "step":
            drops = (steps / run >= 0.5) + (steps / run >= 0.75) if every is None else steps // every
            return float(decay**drops)
        case "exponential":
            return float(decay ** (steps / (every or run)))
        case "inverse-time":
            return 1 / (1 + (0.01 if options.lr_decay is None else decay) * steps / (every or 1))
        case _:
            return 1.0
