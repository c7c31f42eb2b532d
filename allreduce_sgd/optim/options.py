"""The options of the optimizer and the learning rate."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["LR_SCHEDULES", "OptimizerOptions"]

LR_SCHEDULES = ("constant", "cosine", "linear", "step", "plateau")


@dataclass(frozen=True)
class OptimizerOptions:
    optimizer: str = option("sgd", "any optimizer of torch.optim by its name, in upper or lower case", metavar="NAME")
    lr: float | None = option(
        None,
        "learning rate, before the schedule; not set: 0.05 for sgd, the optimizer's own default elsewhere",
        minimum=0,
    )
    momentum: float | None = option(
        None,
        "momentum, where the optimizer has it; not set: 0.9 for sgd, the optimizer's own default elsewhere",
        minimum=0,
    )
    nesterov: bool | None = option(None, "Nesterov's form of momentum, where the optimizer has it")
    weight_decay: float | None = option(None, "weight decay, in the form the optimizer has it", minimum=0)
    beta1: float | None = option(None, "first of the optimizer's betas (Adam and its kin)", minimum=0, maximum=1)
    beta2: float | None = option(None, "second of the optimizer's betas", minimum=0, maximum=1)
    eps: float | None = option(None, "the term that keeps the optimizer's division finite", above=0)
    lr_schedule: str = option(
        "constant",
        "course of the learning rate over the whole run: constant, cosine or linear down to 0, step (divided by 10 "
        "at one half and at three quarters of the run), or plateau (falls where the loss does not; see "
        "--plateau-patience)",
        choices=LR_SCHEDULES,
    )
    lr_decay: float | None = option(
        None, "factor by which the learning rate falls: of plateau 0.1 where it is not set", above=0
    )
    plateau_patience: int | None = option(
        None,
        "how many looks in a row at a loss that is not a new best one plateau puts up with before the learning rate "
        "falls: with --validation-fraction at the validation loss of every evaluation, else at the training loss of "
        "every epoch; not set: 5",
        minimum=0,
    )
    warmup_steps: int = option(0, "steps over which the learning rate first rises linearly from 0", minimum=0)
    clip_norm: float | None = option(None, "scale gradients down to this global L2 norm if they are larger", above=0)
