"""Weight decay in both of its forms, and L1 in two, around any optimizer: as hooks before and after its step.

With the loss f, the optimizer's step S(w, gradient), learning rate lr, L2 strength b and L1 strength a:

    coupled       S(w, grad f + b w): the gradient of f + b |w|^2 / 2, which adaptive methods then divide by its size
    decoupled     S(w (1 - lr b), grad f): Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019,
                  arXiv 1711.05101
    subgradient   S(w, grad f + a sign(w)), sign(0) = 0: seldom comes to zeros
    proximal      soft threshold of S(w, grad f): each w moves towards 0 by lr a, and stops there. With gradient descent
                  this is ISTA, with --optimizer nesterov FISTA with constant momentum (Beck and Teboulle, SIAM Journal
                  on Imaging Sciences 2(1), 2009), with heavy-ball iPiano (Ochs et al., same journal 7(2), 2014)

Hooks run where the optimizer steps: on the shards of a sharded one, on servers, and within a loss scaler after it has
divided gradients by the scale, only in steps that it does not skip. Gradients are clipped before, so clipping is that
of the loss alone. Parameters without a gradient are left alone, as they are by the optimizer. Losses that are reported
are those of f. All parameters count, biases too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softshrink
from torch.optim import Optimizer

from allreduce_sgd.optim.heavy_ball import HeavyBall
from allreduce_sgd.optim.nesterov import Nesterov

__all__ = ["FORMS", "penalize", "penalized"]

FORMS = ("coupled_decay", "decoupled_decay", "l1_subgradient", "l1_proximal")
"""Options of a parameter group, each the strength of one term; what is missing counts as 0."""


def penalize(optimizer: Optimizer, **strengths: float) -> None:
    """Add these terms, of FORMS by name, to all groups of the optimizer that do not have them, and step with them."""
    for group in optimizer.param_groups:
        for form in FORMS:
            group.setdefault(form, strengths.get(form, 0.0))
    terms = _Terms()
    optimizer.register_step_pre_hook(terms.before)
    optimizer.register_step_post_hook(terms.after)


def penalized(group: dict[str, Any]) -> bool:
    """Say whether any term is added in the steps of these parameters."""
    return any(group.get(form) for form in FORMS)


class _Terms:
    def __init__(self) -> None:
        # The loss's own, which may be views of memory that others read or that stays in use.
        self._gradients: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._gradients = []
        for group in optimizer.param_groups:
            decay, subgradient = group.get("coupled_decay", 0.0), group.get("l1_subgradient", 0.0)
            shrinking = 1 - group["lr"] * group.get("decoupled_decay", 0.0)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if decay or subgradient:
                    self._gradients.append((parameter, parameter.grad))
                    parameter.grad = parameter.grad.add(parameter, alpha=decay).add_(
                        torch.sign(parameter), alpha=subgradient
                    )
                if shrinking != 1:
                    parameter.mul_(shrinking)

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []
        for group in optimizer.param_groups:
            threshold = group["lr"] * group.get("l1_proximal", 0.0)
            if not threshold:
                continue
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if isinstance(optimizer, HeavyBall | Nesterov):
                    optimizer.change_(group, parameter, lambda w, by=threshold: softshrink(w, by))  # type: ignore[misc]
                else:
                    parameter.copy_(softshrink(parameter, threshold))
