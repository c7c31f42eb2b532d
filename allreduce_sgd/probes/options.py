"""The options of what is tried before training."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["ProbeOptions"]


@dataclass(frozen=True)
class ProbeOptions:
    find_lr: bool = option(
        False,
        "instead of training, take up to 100 steps (or --steps) with a learning rate that rises from 1e-6 to 10, and "
        "write how the loss went, and which rates that suggests, to lr-finder.json and lr-finder.png",
    )
    check_gradients: int | None = option(
        None,
        "before training, compare the back-propagated gradients of so many elements of the parameters, others on every "
        "rank, with numerical differences in float64, and end with status 2 where they differ",
        minimum=1,
    )
