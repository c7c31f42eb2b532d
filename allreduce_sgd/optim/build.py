"""From the options to an optimizer, torch's or ours: only options that were set are passed on, and only if it has them.

Weight decay in the optimizer's own form is its own business; in the other form, and L1, are `penalties.py`'s.
"""

import inspect
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.heavy_ball import HeavyBall
from allreduce_sgd.optim.lamb import Lamb
from allreduce_sgd.optim.lars import Lars
from allreduce_sgd.optim.nesterov import Nesterov
from allreduce_sgd.optim.newton import Newton
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.optim.penalties import penalize, penalized

__all__ = ["build_optimizer", "check_takes_sparse", "name_of", "needs_closure", "optimizer_names"]

_OURS: Mapping[str, type[torch.optim.Optimizer]] = MappingProxyType(
    {
        "heavy-ball": HeavyBall,
        "nesterov": Nesterov,
        "amsgrad": torch.optim.Adam,
        "lars": Lars,
        "lamb": Lamb,
        "newton": Newton,
    }
)
_FIXED: Mapping[str, dict[str, Any]] = MappingProxyType({"amsgrad": {"amsgrad": True}})
# What options are called that have other names there.
_ARGUMENTS = MappingProxyType(
    {"lbfgs_history": "history_size", "line_search": "line_search_fn", "max_iterations": "max_iter"}
)
_PASSED_ON = (
    *("lr", "momentum", "nesterov", "eps", "rho", "alpha", "centered", "trust", "damping"),
    *_ARGUMENTS,
    "weight_decay",
)
# LBFGS makes them dense.
_TAKE_SPARSE = ("sgd", "adagrad", "sparseadam", "lbfgs")
_SGD_DEFAULTS = {"lr": 0.05, "momentum": 0.9}
_DECOUPLED = ("adamw", "adafactor", "muon")
# Whose ratio of norms has the decay in it, where neither form has a meaning.
_LAYER_WISE = ("lars", "lamb")


def optimizer_names() -> dict[str, type[torch.optim.Optimizer]]:
    """Return torch.optim's optimizers by their lower-case names, and ours by those that --optimizer has for them."""
    found = {}
    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            found[name.lower()] = kind
    return found | dict(_OURS)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the name by which --optimizer knows this kind of optimizer."""
    kind = type(optimizer)
    return next((name for name, ours in _OURS.items() if ours is kind and name not in _FIXED), kind.__name__.lower())


def build_optimizer(
    options: OptimizerOptions, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Build the optimizer of these parameters, or groups of them.

    An option it does not have, or that it refuses, raises ConfigError naming the flag.
    """
    name = options.optimizer.lower()
    known = optimizer_names()
    kind = known.get(name)
    if kind is None:
        raise ConfigError(
            f"--optimizer: unknown optimizer {options.optimizer!r}; choose from {', '.join(sorted(known))}"
        )
    accepted = inspect.signature(kind).parameters
    terms = _terms(options, name)
    arguments: dict[str, Any] = dict(_FIXED.get(name, {}))
    for flag in _PASSED_ON:
        value = getattr(options, flag)
        if flag == "weight_decay" and ("coupled_decay" in terms or "decoupled_decay" in terms):
            value = 0.0 if flag in accepted else None
        if value is None and kind is torch.optim.SGD:
            value = _SGD_DEFAULTS.get(flag)
        if value is None:
            continue
        argument = _ARGUMENTS.get(flag, flag)
        if argument not in accepted:
            raise ConfigError(f"--{flag.replace('_', '-')}: {kind.__name__} has no such option")
        if flag == "line_search":
            value = None if value == "none" else value.replace("-", "_")
        arguments[argument] = value
    if options.beta1 is not None or options.beta2 is not None:
        if "betas" not in accepted:
            raise ConfigError(f"--beta1, --beta2: {kind.__name__} has no betas")
        first, second = accepted["betas"].default
        arguments["betas"] = (
            first if options.beta1 is None else options.beta1,
            second if options.beta2 is None else options.beta2,
        )
    try:
        optimizer = kind(parameters, **arguments)
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"--optimizer {options.optimizer}: {' '.join(str(problem).split())}") from problem
    if terms:
        penalize(optimizer, **terms)
    return optimizer


def _terms(options: OptimizerOptions, name: str) -> dict[str, float]:
    """Return the penalties that are not the optimizer's own, or raise ConfigError where it cannot have them."""
    terms: dict[str, float] = {}
    form, decay = options.weight_decay_form, options.weight_decay
    own = "decoupled" if name in _DECOUPLED else "coupled"
    if form is not None and name in _LAYER_WISE:
        raise ConfigError(f"--weight-decay-form {form}: {name} has weight decay in its ratio of norms; leave it out")
    if form is not None and decay is not None and (form != own or name == "rprop"):
        terms[f"{form}_decay"] = decay
    if options.l1 is not None:
        terms[f"l1_{options.l1_form or 'proximal'}"] = options.l1
    if terms and name in ("lbfgs", "newton"):
        flag = f"--l1 {options.l1:g}" if options.l1 is not None else f"--weight-decay-form {form}"
        raise ConfigError(
            f"{flag}: {name} evaluates the loss several times a step, and knows nothing of a penalty added to its "
            f"gradients; take another --optimizer"
        )
    return terms


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether `step` evaluates the loss itself, several times (LBFGS, Newton)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_takes_sparse(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError unless the optimizer takes sparse gradients, such as those of Embedding with sparse=True."""
    name = name_of(optimizer)
    if name not in _TAKE_SPARSE:
        raise ConfigError(
            f"--optimizer {name}: it takes no sparse gradients, which the model has; allowed are "
            f"{', '.join(_TAKE_SPARSE)}"
        )
    for group in optimizer.param_groups:
        decay = group.get("weight_decay") or group.get("coupled_decay") or group.get("decoupled_decay")
        if decay:
            raise ConfigError(
                f"--weight-decay {decay:g}: it changes all rows of the parameters, and the model's gradients are "
                f"sparse; allowed is 0"
            )
        if penalized(group):
            raise ConfigError("--l1: it changes all rows of the parameters, and the model's gradients are sparse")
