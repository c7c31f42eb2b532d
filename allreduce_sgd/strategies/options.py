"""The options of the distribution strategy."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["STRATEGIES", "StrategyOptions"]

STRATEGIES = ("sync", "local")


@dataclass(frozen=True)
class StrategyOptions:
    strategy: str = option(
        "sync",
        "how SGD is distributed: sync (gradients are all-reduced every step), local (every rank steps alone, and "
        "parameters are averaged every --period steps)",
        choices=STRATEGIES,
    )
    period: int = option(8, "steps between two averages of strategy local", minimum=1)
