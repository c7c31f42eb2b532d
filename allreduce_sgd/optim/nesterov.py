"""Nesterov's accelerated gradient: the gradient is taken where the momentum is about to lead.

Nesterov, "A method of solving a convex programming problem with convergence rate O(1/k^2)", Soviet Mathematics Doklady
27(2), 1983, with a constant momentum:

    w_{t+1} = w_t - lr grad f(w_t + momentum (w_t - w_{t-1})) + momentum (w_t - w_{t-1}).

Change of variables. Gradients are taken where the parameters are, so in training the parameters hold the point ahead,
y_t = w_t + momentum d_t with the displacement d_t = w_t - w_{t-1}, which is kept. Then, exactly,

    d_{t+1} = momentum d_t - lr grad f(y_t),    y_{t+1} = y_t - lr grad f(y_t) + momentum d_{t+1},

and `look_back_` gives w_t = y_t - momentum d_t. Strategies whose ranks all take the same step evaluate, save and end
with w_t. Where ranks average their models, where servers step, and in Hogwild!, there is no one d_t for the consensus:
there y_t is what is averaged, evaluated, saved and left in the end.

torch.optim.SGD with nesterov=True keeps a sum of gradients, v <- momentum v + g, and steps by y <- y - lr (g + momentum
v). At a constant learning rate that is the same y_t, but torch leaves y_t as the result, not w_t. Where the rate
changes, torch's sum moves by the new rate at once, here each gradient by the rate of its own step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Nesterov"]


class Nesterov(Optimizer):
    """Steps by the formula above, in place, on parameters that hold y_t; `weight_decay` y_t is added to the gradient.

    At first y_0 = w_0, so nothing needs to be done before training.
    """

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
                    raise RuntimeError("Nesterov takes dense gradients only")
                gradient = parameter.grad.add(parameter, alpha=decay) if decay else parameter.grad
                displacement = self._displacement(parameter)
                displacement.mul_(momentum).sub_(gradient, alpha=lr)
                parameter.sub_(gradient, alpha=lr).add_(displacement * momentum)
        return loss

    @torch.no_grad()
    def look_back_(self) -> None:
        """Move the parameters from y_t to w_t. `step` must not follow before they are back at y_t."""
        self._move(-1)

    @torch.no_grad()
    def look_ahead_(self) -> None:
        """Move the parameters from w_t to y_t: as far as numbers are rounded, back to where `look_back_` found them."""
        self._move(1)

    @torch.no_grad()
    def change_(self, group: dict[str, Any], parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        """Replace w_{t+1} by change(w_{t+1}), as a part of the step just taken; the parameter holds y_{t+1} again."""
        displacement, momentum = self._displacement(parameter), group["momentum"]
        iterate = parameter - displacement * momentum
        changed = change(iterate)
        displacement.add_(changed - iterate)
        torch.add(changed, displacement * momentum, out=parameter)

    def _move(self, sign: int) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if "displacement" in self.state.get(parameter, {}):
                    # Rounded before it is added: what is 0 at w is 0 again on the way back.
                    parameter.add_(self.state[parameter]["displacement"] * group["momentum"], alpha=sign)

    def _displacement(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "displacement" not in state:
            state["displacement"] = torch.zeros_like(parameter)
        displacement: Tensor = state["displacement"]
        return displacement
