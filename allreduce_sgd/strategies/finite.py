"""Where each rank steps by its own gradients: whether they are finite."""

import torch
from torch import Tensor, nn

from allreduce_sgd.errors import NonFiniteError
from allreduce_sgd.gradients.sparse import gradient_values

__all__ = ["check_finite"]


def check_finite(model: nn.Module, loss: Tensor, rank: int) -> None:
    """Raise NonFiniteError, on this rank alone, where its loss or one of its gradients holds NaN or infinity."""
    names = [name for name, one in model.named_parameters() if one.grad is not None]
    values = gradient_values(model.parameters())
    if torch.isfinite(nn.utils.get_total_norm(values) + loss):
        return
    # A norm may overflow where no element does.
    bad = [
        f"the gradient of {name}" for name, value in zip(names, values, strict=True) if not torch.isfinite(value).all()
    ]
    if not torch.isfinite(loss):
        bad.insert(0, "the loss")
    if bad:
        raise NonFiniteError(f"NaN or Inf in {', '.join(bad)} of rank {rank}")
