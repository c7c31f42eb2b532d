"""Numerical derivatives, to compare back-propagation with.

The central difference (f(x + h) − f(x − h)) / 2h is off by h² f‴/6 and by about ε f / h of rounding, so that
h = ε^(1/3) max(1, |x|) balances the two (Press et al., Numerical Recipes, section 5.7). Where f has a kink within x ± h
(ReLU, max, |·|), it is a mean of two slopes that no derivative has; so ever shorter steps are tried before a difference
counts. At a kink f has no derivative: there anything between the slopes to the left and to the right is a subgradient,
and right.
"""

from collections.abc import Callable

from torch import Tensor, finfo, float64

__all__ = ["TOLERANCE", "central_difference", "relative_error"]

TOLERANCE = 1e-4
"""The largest relative error of a right derivative."""
_EPSILON = finfo(float64).eps
_STEP = _EPSILON ** (1 / 3)
_SHORTER = (1.0, 0.1, 0.01)
# How many roundings of a whole forward pass may add up in f.
_ROUNDINGS = 50
# How many times that noise the slopes to the left and to the right differ by where there is a kink.
_KINK = 10


def central_difference(function: Callable[[], float], element: Tensor, step: float | None = None) -> float:
    """Return the derivative of `function` by `element`, a float64 scalar that it reads, and which is left as it was.

    `step` None: the one that balances the two errors.
    """
    step = _STEP * max(1.0, abs(element.item())) if step is None else step
    below, above = _around(function, element, step)
    return (above - below) / (2 * step)


def relative_error(function: Callable[[], float], element: Tensor, derivative: float) -> tuple[float, float]:
    """Return (how wrong `derivative` is, the numerical derivative it was compared with), of f by `element`.

    The error is relative to the larger of the two, or where both are so small that the rounding of f would count, to
    what that could explain; up to TOLERANCE it proves nothing.
    """
    here = function()
    error = central = 0.0
    for shorter in _SHORTER:
        longer = central
        step = shorter * _STEP * max(1.0, abs(element.item()))
        below, above = _around(function, element, step)
        central, noise = (above - below) / (2 * step), _ROUNDINGS * _EPSILON * (1 + abs(here)) / step
        if shorter < 1 and 2 * abs(central - longer) < abs(derivative - longer):
            # No kink explains it, and the longer step is the more exact.
            central = longer
            break
        error = _relative(derivative, central, noise)
        if error <= TOLERANCE:
            return error, central
    left, right = sorted(((here - below) / step, (above - here) / step))
    if right - left > _KINK * noise:
        nearest = min(max(derivative, left), right)
        return min((error, central), (_relative(derivative, nearest, noise), nearest))
    return error, central


def _around(function: Callable[[], float], element: Tensor, step: float) -> tuple[float, float]:
    before = element.item()
    try:
        element.fill_(before - step)
        below = function()
        element.fill_(before + step)
        return below, function()
    finally:
        element.fill_(before)


def _relative(derivative: float, numerical: float, noise: float) -> float:
    error = abs(derivative - numerical) / (max(abs(derivative), abs(numerical)) + noise / TOLERANCE)
    # Of NaN nothing is right.
    return error if error == error else float("inf")
