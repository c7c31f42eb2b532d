"""The global norm of the gradients, and clipping by it (Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063).

Norms are taken of whole buckets. Where the caller promises that gradients stay as they are reduced, that is done as
soon as each bucket has been reduced, while later ones are still in flight and its memory is still in the cache; at the
end only one number per bucket is combined. The promise is needed: torch counts most changes in `_version`, but neither
those of its gradient scaler nor those through `.data`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from allreduce_sgd.gradients.buckets import Bucket, Kind, kind_of
from allreduce_sgd.gradients.sparse import gradient_values

__all__ = ["BucketNorms", "clip_factor", "clip_grad_norm_", "lie_in"]

# As torch.nn.utils.clip_grad_norm_ has it, so that the outcomes are equal.
_EPSILON = 1e-6


class BucketNorms:
    """Norms of buckets, taken when each has been reduced; valid as long as nobody changes what lies in the buckets."""

    def __init__(self, norm_type: float) -> None:
        self.norm_type = norm_type
        self._norms: dict[int, Tensor] = {}
        # Buckets of one kind share memory, so also its version, which the arrival of each raises: the last one counts.
        self._versions: dict[Kind, int] = {}

    def measure(self, bucket: Bucket) -> None:
        dtype = torch.float32 if bucket.buffer.dtype in (torch.float16, torch.bfloat16) else None
        norm = torch.linalg.vector_norm(bucket.buffer, self.norm_type, dtype=dtype)
        self._norms[bucket.buffer.data_ptr()] = norm
        self._versions[kind_of(bucket.buffer)] = bucket.buffer._version

    def total(self, buckets: Sequence[Bucket]) -> Tensor | None:
        """Return the norm over all buckets, None where there are none; the same bits on all ranks."""
        for bucket in buckets:
            changed = self._versions.get(kind_of(bucket.buffer)) != bucket.buffer._version
            if changed or bucket.buffer.data_ptr() not in self._norms:
                # Ranks need not see alike.
                for one in buckets:
                    self.measure(one)
                break
        norms = [self._norms[bucket.buffer.data_ptr()] for bucket in buckets]
        return torch.linalg.vector_norm(torch.stack(norms), self.norm_type) if norms else None


def lie_in(buckets: Sequence[Bucket], parameters: Sequence[nn.Parameter]) -> bool:
    """Say whether the gradients of the parameters are exactly what lies in the buckets."""
    slots = {id(one): slot for bucket in buckets for one, slot in zip(bucket.parameters, bucket.slots, strict=True)}
    lying = 0
    for parameter in parameters:
        if parameter.grad is not None:
            if parameter.grad is not slots.get(id(parameter)):
                return False
            lying += 1
    return lying == len(slots)


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Do as torch.nn.utils.clip_grad_norm_, also where gradients are sparse; these are coalesced, in place."""
    values = gradient_values(parameters)
    norm = nn.utils.get_total_norm(values, norm_type)
    factor = clip_factor(norm, max_norm)
    for value in values:
        value.mul_(factor.to(value.device))
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of this norm are to be multiplied by so that their norm is at most `max_norm`."""
    return (max_norm / (norm + _EPSILON)).clamp(max=1.0)
