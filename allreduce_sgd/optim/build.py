"""From the options to a torch.optim optimizer: only options that were set are passed on, and only if it has them."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.options import OptimizerOptions

__all__ = ["build_optimizer", "check_takes_sparse", "needs_closure", "optimizer_names"]

# LBFGS makes them dense.
_TAKE_SPARSE = ("sgd", "adagrad", "sparseadam", "lbfgs")
_SGD_DEFAULTS = {"lr": 0.05, "momentum": 0.9}


def optimizer_names() -> dict[str, type[torch.optim.Optimizer]]:
    """Return torch.optim's optimizers by their lower-case names."""
    found = {}
    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            found[name.lower()] = kind
    return found


def build_optimizer(
    options: OptimizerOptions, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Build the optimizer of these parameters, or groups of them.

    An option it does not have, or that it refuses, raises ConfigError naming the flag.
    """
    known = optimizer_names()
    kind = known.get(options.optimizer.lower())
    if kind is None:
        raise ConfigError(
            f"--optimizer: unknown optimizer {options.optimizer!r}; choose from {', '.join(sorted(known))}"
        )
    accepted = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {}
    for flag in ("lr", "momentum", "nesterov", "weight_decay", "eps"):
        value = getattr(options, flag)
        if value is None and kind is torch.optim.SGD:
            value = _SGD_DEFAULTS.get(flag)
        if value is None:
            continue
        if flag not in accepted:
            raise ConfigError(f"--{flag.replace('_', '-')}: {kind.__name__} has no such option")
        arguments[flag] = value
    if options.beta1 is not None or options.beta2 is not None:
        if "betas" not in accepted:
            raise ConfigError(f"--beta1, --beta2: {kind.__name__} has no betas")
        first, second = accepted["betas"].default
        arguments["betas"] = (
            first if options.beta1 is None else options.beta1,
            second if options.beta2 is None else options.beta2,
        )
    try:
        return kind(parameters, **arguments)
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"--optimizer {options.optimizer}: {' '.join(str(problem).split())}") from problem


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether `step` evaluates the loss itself, several times (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_takes_sparse(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError unless the optimizer takes sparse gradients, such as those of Embedding with sparse=True."""
    name = type(optimizer).__name__.lower()
    if name not in _TAKE_SPARSE:
        raise ConfigError(
            f"--optimizer {name}: it takes no sparse gradients, which the model has; allowed are "
            f"{', '.join(_TAKE_SPARSE)}"
        )
    for group in optimizer.param_groups:
        if group.get("weight_decay"):
            raise ConfigError(
                f"--weight-decay {group['weight_decay']:g}: it changes all rows of the parameters, and the model's "
                f"gradients are sparse; allowed is 0"
            )
