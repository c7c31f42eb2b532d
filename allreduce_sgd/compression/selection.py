"""The k elements of largest magnitude, found in little more than two passes over the memory.

A threshold is taken from a sample so that, very likely, somewhat more than k elements reach it; among these the k
largest are then sought. (Sampling as in Lin et al., "Deep gradient compression", ICLR 2018, arXiv 1712.01887; here the
result is the exact one, since where too few reach the threshold all elements are searched.) A search of all elements
takes about ten times as long.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["largest"]

_SAMPLES = 4096
# Sampled ranks scatter by a standard deviation of their square root.
_DEVIATIONS = 4.0


def largest(magnitudes: Tensor, k: int) -> Tensor:
    """Return the indices (int64, in any order) of the k largest of the flat `magnitudes`; NaN counts as the largest.

    `magnitudes` is contiguous, float32 or float64 on the CPU. Which of equal elements are taken is not defined, but
    the same for equal input.
    """
    length = magnitudes.numel()
    if k >= length:
        return torch.arange(length, device=magnitudes.device)
    stride = length // _SAMPLES
    candidates = None
    if magnitudes.device.type == "cpu" and stride >= 2:
        candidates = _candidates(magnitudes, k, stride)
    if candidates is None:
        return torch.topk(magnitudes, k, sorted=False).indices
    return candidates[torch.topk(magnitudes[candidates], k, sorted=False).indices]


def _candidates(magnitudes: Tensor, k: int, stride: int) -> Tensor | None:
    """Return the indices of at least k elements with all of the k largest, None if there is no such threshold."""
    sample = magnitudes[::stride]
    expected = k * sample.numel() / magnitudes.numel()
    rank = int(expected + _DEVIATIONS * expected**0.5) + 1
    if rank >= sample.numel():
        return None
    threshold = torch.kthvalue(sample, sample.numel() - rank).values.item()
    # Not `>=`, so that NaN is among them.
    candidates = torch.from_numpy(np.flatnonzero(~np.less(magnitudes.numpy(), threshold)))
    return candidates if len(candidates) >= k else None
