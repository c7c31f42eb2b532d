"""The options of the optimizer, of what keeps parameters small, and of the learning rate."""

from dataclasses import dataclass

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.options import option

__all__ = ["LR_SCHEDULES", "OptimizerOptions"]

LR_SCHEDULES = ("constant", "cosine", "linear", "step", "exponential", "polynomial", "inverse-time")
_WITH_DECAY = ("step", "exponential", "inverse-time", "plateau")
_WITH_DECAY_EVERY = ("step", "exponential", "inverse-time")
_WITH_POWER = ("polynomial",)


@dataclass(frozen=True)
class OptimizerOptions:
    optimizer: str = option(
        "sgd",
        "any optimizer of torch.optim by its name, in upper or lower case; heavy-ball or nesterov, momentum as in "
        "textbooks (they differ from sgd's where the learning rate changes, and nesterov in where it evaluates); "
        "amsgrad; lars or lamb, for large batches; newton, for up to 4096 parameters. Gradient descent is sgd with "
        "--full-batch --momentum 0",
        metavar="NAME",
    )
    lr: float | None = option(
        None,
        "learning rate, before scaling and schedule; not set: 0.05 for sgd, the optimizer's own default elsewhere",
        minimum=0,
    )
    momentum: float | None = option(
        None,
        "momentum, where the optimizer has it; not set: 0.9 for sgd, the optimizer's own default elsewhere",
        minimum=0,
    )
    nesterov: bool | None = option(None, "torch's form of Nesterov's momentum, where the optimizer has it")
    beta1: float | None = option(None, "first of the optimizer's betas (Adam and its kin)", minimum=0, maximum=1)
    beta2: float | None = option(None, "second of the optimizer's betas", minimum=0, maximum=1)
    eps: float | None = option(None, "the term that keeps the optimizer's division finite", above=0)
    rho: float | None = option(None, "adadelta: how much of its averages stays in a step", minimum=0, maximum=1)
    alpha: float | None = option(None, "rmsprop: how much of its average stays in a step", minimum=0, maximum=1)
    centered: bool | None = option(None, "rmsprop: divide by the standard deviation of gradients, not by their size")
    trust: float | None = option(None, "lars: the length of a layer's step over its norm, at --lr 1", above=0)
    damping: float | None = option(
        None, "newton: added to the Hessian's diagonal at first, then adapted; 0: none, ever", minimum=0
    )
    lbfgs_history: int | None = option(None, "lbfgs: the steps that it remembers", minimum=1)
    line_search: str | None = option(
        None, "lbfgs: none (steps of --lr) or strong-wolfe; not set: none", choices=("none", "strong-wolfe")
    )
    max_iterations: int | None = option(
        None, "lbfgs: iterations, of one gradient or more each, per optimizer step; not set: 20", minimum=1
    )
    weight_decay: float | None = option(
        None,
        "strength of weight decay (L2), in the optimizer's form or that of --weight-decay-form",
        minimum=0,
    )
    weight_decay_form: str | None = option(
        None,
        "coupled: weight decay is added to the gradient, decoupled: parameters shrink by it times the learning rate, "
        "as in AdamW; not set: as the optimizer has it",
        choices=("coupled", "decoupled"),
    )
    l1: float | None = option(None, "strength of an L1 penalty on all parameters", minimum=0)
    l1_form: str | None = option(
        None,
        "proximal: after each step parameters move towards 0 by --l1 times the learning rate, and stop there (exact "
        "zeros), or subgradient: --l1 times their sign is added to gradients; not set: proximal",
        choices=("proximal", "subgradient"),
    )
    lr_schedule: str = option(
        "constant",
        "course of the learning rate over the steps t after the warm-up: constant; cosine, linear or polynomial, down "
        "to 0 at the end of the run; step, times --lr-decay every --lr-decay-every steps (not set: at one half and at "
        "three quarters of the run); exponential, --lr-decay^(t / --lr-decay-every) (not set: the run); inverse-time, "
        "1 / (1 + --lr-decay t / --lr-decay-every) (not set: 1)",
        choices=LR_SCHEDULES,
    )
    lr_decay: float | None = option(None, "factor of the schedule; not set: 0.1, for inverse-time 0.01", above=0)
    lr_decay_every: int | None = option(None, "steps that --lr-decay is meant for", minimum=1)
    lr_power: float | None = option(
        None, "exponent of the polynomial schedule, (1 - t / all)^power; not set: 2", above=0
    )
    warmup_steps: int = option(0, "steps over which the learning rate first rises linearly from 0", minimum=0)
    lr_scaling: str = option(
        "none",
        "multiply the learning rate by B / --lr-base-batch (linear), or by its square root (sqrt), with B the samples "
        "of all ranks in a step",
        choices=("none", "linear", "sqrt"),
    )
    lr_base_batch: int | None = option(
        None, "the samples in a step that --lr is meant for, for --lr-scaling; not set: 256", minimum=1
    )
    clip_norm: float | None = option(
        None, "scale gradients of the loss down to this global L2 norm if they are larger, before penalties", above=0
    )

    def check(self) -> None:
        """Raise ConfigError for an option that has no meaning with the others."""
        for flag, value, schedules in (
            ("lr-decay", self.lr_decay, _WITH_DECAY),
            ("lr-decay-every", self.lr_decay_every, _WITH_DECAY_EVERY),
            ("lr-power", self.lr_power, _WITH_POWER),
        ):
            if value is not None and self.lr_schedule not in schedules:
                raise ConfigError(
                    f"--{flag} {value:g}: --lr-schedule {self.lr_schedule} has no use for it, only "
                    f"{', '.join(schedules)}"
                )
        if self.lr_decay is not None and self.lr_decay > 1 and self.lr_schedule != "inverse-time":
            raise ConfigError(
                f"--lr-decay {self.lr_decay:g}: the learning rate would rise with --lr-schedule {self.lr_schedule}; it "
                f"must be at most 1"
            )
        for flag, given, needed, there in (
            ("lr-base-batch", self.lr_base_batch, "lr-scaling linear or sqrt", self.lr_scaling != "none"),
            ("weight-decay-form", self.weight_decay_form, "weight-decay", self.weight_decay is not None),
            ("l1-form", self.l1_form, "l1", self.l1 is not None),
        ):
            if given is not None and not there:
                raise ConfigError(f"--{flag} {given}: it has no use without --{needed}")
