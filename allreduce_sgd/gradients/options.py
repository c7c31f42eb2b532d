"""The options of the gradient engine."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["BUFFERS", "GradientOptions"]

BUFFERS = ("leave", "average", "broadcast")


@dataclass(frozen=True)
class GradientOptions:
    bucket_mb: float = option(
        25.0, "size of a gradient bucket in MiB: larger ones cost less per byte, smaller ones overlap better", above=0
    )
    first_bucket_mb: float = option(
        1.0, "size in MiB of the first bucket, small so that the first reduction starts early", above=0
    )
    shard_optimizer: bool | None = option(
        None,
        "let each rank keep the optimizer's state of its share of the parameters, and update only that (ZeRO stage 1); "
        "the same result. Not set: where the ranks of one node reduce through shared memory, so that it saves time, "
        "and the optimizer works element by element",
    )
    buffers: str = option(
        "leave",
        "what becomes of the model's buffers, such as batch-norm statistics, in training: leave (each rank has its "
        "own), average or broadcast (every step, in strategy local every exchange, makes them all ranks' average, "
        "or those of rank 0); for evaluation and at the end they are averaged, with broadcast those of rank 0",
        choices=BUFFERS,
    )
    sync_batch_norm: bool = option(
        False, "have batch normalisation use the mean and variance over all ranks' samples, also on CPUs"
    )
    find_unused_parameters: bool = option(
        True,
        "accept parameters that get no gradient in a step; with --no-find-unused-parameters they are an error that "
        "names them",
    )
    static_graph: bool = option(
        False,
        "promise that every step uses the same parameters equally often: then parameters may get several gradients in "
        "a backward pass (re-entrant checkpointing), and those never used are not waited for",
    )
    check_finite: bool = option(
        False,
        "stop all ranks at the first NaN or Inf in a gradient, with the parameter, the rank and the step; costs one "
        "pass over the gradients",
    )
    check_sync: int | None = option(
        None,
        "steps between two checks that all ranks hold the same parameters, bit for bit (strategy local: at the next "
        "exchange); where they do not, all stop and the first parameter that differs is named; not set: at the end "
        "only",
        minimum=1,
    )
