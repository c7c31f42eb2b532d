"""LAMB: Adam's direction, of a length in proportion to the norm of each layer.

You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020, arXiv 1904.00962,
algorithm 2. With gradient g of a layer's weights w, and Adam's moments

    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,
    r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps),
    w <- w - lr |w| / |r + b w| (r + b w)

with weight decay b. Norms are those of whole parameters, so a sharded optimizer keeps these whole. Where |w| or |r + b
w| is 0 the ratio is 1. The paper's function of |w| is the identity here, without bounds.

Difference from the paper's algorithm: parameters of fewer than two dimensions (biases, the scales and shifts of
normalisation) take Adam's step, with neither ratio nor decay, as the paper's published experiments do.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["Lamb"]


class Lamb(Optimizer):
    """Steps by the formula above, in place."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

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
            raise RuntimeError("Lamb takes dense gradients only")
        (beta1, beta2), lr = group["betas"], group["lr"]
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["first"] = torch.zeros_like(parameter)
            state["second"] = torch.zeros_like(parameter)
        state["step"] += 1
        steps = int(state["step"])
        first = state["first"].lerp_(gradient, 1 - beta1)
        second = state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        move = (first / (1 - beta1**steps)) / (second / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        if parameter.dim() > 1:
            move.add_(parameter, alpha=group["weight_decay"])
            norm, length = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(move)
            ratio = torch.where((norm > 0) & (length > 0), norm / length, torch.ones_like(norm))
            move.mul_(ratio)
        parameter.sub_(move, alpha=lr)
