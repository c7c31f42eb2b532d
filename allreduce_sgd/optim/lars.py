"""LARS, layer-wise adaptive rate scaling: every layer steps in proportion to its own norm.

You, Gitman and Ginsburg, "Large batch training of convolutional networks", 2017, arXiv 1708.03888, algorithm 1. With
gradient g of a layer's weights w, weight decay b, momentum m and trust coefficient c,

    v <- m v + lr c |w| / (|g| + b |w|) (g + b w),    w <- w - v.

Norms are those of whole parameters, so a sharded optimizer keeps these whole. Where |w| or |g| is 0 the ratio is 1.

Difference from the paper: parameters of fewer than two dimensions (biases, the scales and shifts of normalisation) take
plain momentum steps, with neither ratio nor decay, as large-batch training that followed the paper does: their norms
say little, and they are 0 at first. The paper's polynomial decay of lr is --lr-schedule polynomial.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["Lars"]


class Lars(Optimizer):
    """Steps by the formula above, in place; `trust` is c."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.5,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError("Lars takes dense gradients only")
        lr, decay = group["lr"], group["weight_decay"]
        if parameter.dim() > 1:
            norm, steepness = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            ratio = group["trust"] * norm / (steepness + decay * norm)
            ratio = torch.where((norm > 0) & (steepness > 0), ratio, torch.ones_like(ratio))
            gradient = gradient.add(parameter, alpha=decay).mul_(ratio)
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity = state["velocity"].mul_(group["momentum"]).add_(gradient, alpha=lr)
        parameter.sub_(velocity)
