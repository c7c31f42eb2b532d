"""Newton's method with damping, for models of few parameters: a step to the minimum of the loss's second-order model.

    w <- w - lr (H + damping I)^{-1} g

with gradient g and Hessian H of the mini-batch's loss. The damping follows Levenberg (Quarterly of Applied Mathematics
2, 1944) and Marquardt (SIAM Journal 11(2), 1963), in the form of a trust region: with the decrease of the loss over the
one that the second-order model predicts, r, a step with r > 3/4 divides the damping by 3, one with r < 1/4 doubles it,
and one that does not lower the loss is taken back and tried again with 4 times the damping, as is a matrix that is not
positive definite. With damping 0 it is the plain method, which makes no trials: it takes the step of least norm that
solves H s = g, also towards a saddle or a maximum, and reaches a quadratic's minimum in one step.

The Hessian is exact, by differentiating every element of the gradient. It is a sum over samples like the loss,
so ranks add up theirs: n^2 numbers in one all-reduce beside the gradients. A matrix of n x n and its factors limit the
number of parameters n.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["MOST_PARAMETERS", "Newton", "hessian_of"]

MOST_PARAMETERS = 4096
_TRIALS = 20
_LEAST_DAMPING = 1e-12
# Rows of the Hessian that are computed at once: each takes the memory of a backward pass.
_ROWS = 64


class Newton(Optimizer):
    """Steps by the formula above, in place, with one group of parameters.

    `weight_decay` b adds b |w|^2 / 2 to the loss, so b w to g and b I to H. `param_groups[0]["damping"]` is the present
    damping. Raises ValueError for models of more than MOST_PARAMETERS elements.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "damping": damping, "weight_decay": weight_decay})
        if len(self.param_groups) != 1:
            raise ValueError("Newton's method has one group of parameters")
        count = sum(parameter.numel() for parameter in self.parameters)
        if count > MOST_PARAMETERS:
            raise ValueError(
                f"the model has {count} parameters, and Newton's method a matrix of as many rows and columns; allowed "
                f"are {MOST_PARAMETERS}: take a smaller --model, or lbfgs"
            )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, whose elements, in this order, number the Hessian's rows and columns."""
        return [parameter for parameter in self.param_groups[0]["params"] if parameter.requires_grad]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any], hessian: Callable[[], Tensor]) -> Any:  # type: ignore[override]
        """Take a step, and return the loss before it.

        `closure` fills `.grad` and returns the loss; it is called again after each trial. `hessian` returns the (n, n)
        matrix of second derivatives of the same loss, such as `hessian_of`. Across ranks both must return the same.
        """
        with torch.enable_grad():
            given = closure()
        group, start = self.param_groups[0], self._flat()
        lr, decay = group["lr"], group["weight_decay"]
        loss = self._penalized(given)
        gradient = self._gradient().add(start, alpha=decay)
        with torch.enable_grad():
            matrix = hessian().detach().double()
        matrix = (matrix + matrix.T) / 2
        matrix.diagonal().add_(decay)
        if group["damping"] == 0:
            self._set(start - lr * (torch.linalg.pinv(matrix, hermitian=True) @ gradient))
            return given
        for _ in range(_TRIALS):
            step = _solve(matrix, group["damping"], gradient)
            if step is not None:
                self._set(start - lr * step)
                with torch.enable_grad():
                    after = self._penalized(closure())
                predicted = lr * float(gradient @ step) - lr * lr * float(step @ (matrix @ step)) / 2
                if after <= loss:
                    self._adapt((loss - after) / predicted if predicted > 0 else 1.0)
                    return given
            group["damping"] *= 4
        self._set(start)
        return given

    def _adapt(self, ratio: float) -> None:
        group = self.param_groups[0]
        if ratio > 0.75:
            group["damping"] = max(group["damping"] / 3, _LEAST_DAMPING)
        elif ratio < 0.25:
            group["damping"] *= 2

    def _penalized(self, loss: Any) -> float:
        decay = self.param_groups[0]["weight_decay"]
        return float(torch.as_tensor(loss).detach()) + (
            decay / 2 * float(self._flat().square().sum()) if decay else 0.0
        )

    def _flat(self) -> Tensor:
        return torch.cat([parameter.detach().double().reshape(-1) for parameter in self.parameters])

    def _gradient(self) -> Tensor:
        return torch.cat(
            [(torch.zeros_like(one) if one.grad is None else one.grad).double().reshape(-1) for one in self.parameters]
        )

    def _set(self, flat: Tensor) -> None:
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.view(parameter.shape))


def hessian_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the (n, n) matrix of second derivatives of a scalar by the n elements of the parameters, in their dtype.

    `loss` needs its graph, which is used up. No hook of the parameters is run but those of torch.autograd.grad.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    if not flat.requires_grad:
        # A loss that is linear in the parameters.
        return flat.new_zeros(flat.numel(), flat.numel())
    rows = []
    for units in torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device).split(_ROWS):
        parts = torch.autograd.grad(
            flat, parameters, units, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        row = [
            units.new_zeros(len(units), one.numel()) if part is None else part.reshape(len(units), -1)
            for one, part in zip(parameters, parts, strict=True)
        ]
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)


def _solve(matrix: Tensor, damping: float, gradient: Tensor) -> Tensor | None:
    """Return (matrix + damping I)^{-1} gradient, None where that matrix is not positive definite."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if int(failed) else torch.cholesky_solve(gradient[:, None], factor)[:, 0]
