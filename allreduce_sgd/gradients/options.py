"""The options of the gradient engine."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["GradientOptions"]


@dataclass(frozen=True)
class GradientOptions:
    bucket_mb: float = option(
        25.0, "size of a gradient bucket in MiB: larger ones cost less per byte, smaller ones overlap better", above=0
    )
    first_bucket_mb: float = option(
        1.0, "size in MiB of the first bucket, small so that the first reduction starts early", above=0
    )
