"""Polyak's heavy ball: a step down the gradient, and a part of the step before once more.

Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and
Mathematical Physics 4(5), 1964:

    w_{t+1} = w_t - lr grad f(w_t) + momentum (w_t - w_{t-1}).

Kept is the displacement w_t - w_{t-1}, not w_{t-1}: where ranks average their models or take over another's, that move
is no step of this optimizer, and is not repeated.

torch.optim.SGD with momentum keeps a sum of gradients, v <- momentum v + g, and steps by w <- w - lr v. At a constant
learning rate both are the same. When the rate changes they are not: SGD applies the new rate to all gradients that it
remembers, at once; here each gradient moves by the rate of its own step, and later rates leave that alone.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["HeavyBall"]


class HeavyBall(Optimizer):
    """Steps by the formula above, in place; `weight_decay` is added to the gradient, times w."""

    elementwise = True

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("HeavyBall takes dense gradients only")
                gradient = parameter.grad.add(parameter, alpha=decay) if decay else parameter.grad
                displacement = self._displacement(parameter)
                displacement.mul_(momentum).sub_(gradient, alpha=lr)
                parameter.add_(displacement)
        return loss

    @torch.no_grad()
    def change_(self, group: dict[str, Any], parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        """Replace w_{t+1} by change(w_{t+1}), as a part of the step just taken: the displacement has it too."""
        changed = change(parameter)
        self._displacement(parameter).add_(changed - parameter)
        parameter.copy_(changed)

    def _displacement(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "displacement" not in state:
            state["displacement"] = torch.zeros_like(parameter)
        displacement: Tensor = state["displacement"]
        return displacement
