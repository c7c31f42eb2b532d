"""The losses of one sample each, without weights and smoothing.

Outputs are scores without a normalisation. Labels y are in 0..C-1 and scores s_0..s_{C-1}, or with two classes
and a single score s (for hinge, logistic and perceptron) y is mapped to -1 or +1:

- cross-entropy: log sum_j exp(s_j) - s_y. nll is the same: it normalises the outputs by log-softmax, which leaves
  outputs unchanged that are log-probabilities already. kl, from the one-hot distribution of y to the softmax of the
  outputs, summed over classes, has the same value as well, since a one-hot distribution has no entropy.
- logistic: log(1 + exp(-y s)); with C scores, cross-entropy.
- hinge: max(0, 1 - y s); with C scores the margin of Crammer and Singer 2001, max_j (s_j + [j != y]) - s_y
  (torch's multi_margin_loss sums over j instead).
- perceptron (Rosenblatt 1958): max(0, -y s); with C scores max_j s_j - s_y.
- mse and l1: mean over outputs of (s - t)^2 or |s - t|, where t is the target, or the one-hot vector of a label.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

__all__ = ["OF_CLASSES", "OF_SINGLE_SCORE", "OF_VALUES", "PerSample"]

PerSample = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores, labels, reduction="none")


def _nll(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.nll_loss(functional.log_softmax(scores, 1), labels, reduction="none")


def _one_hot(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.one_hot(labels, scores.shape[1]).to(scores.dtype)


def _of_label(scores: Tensor, labels: Tensor) -> Tensor:
    return scores.gather(1, labels[:, None]).squeeze(1)


def _hinge(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores + 1 - _one_hot(scores, labels)).amax(1) - _of_label(scores, labels)


def _perceptron(scores: Tensor, labels: Tensor) -> Tensor:
    return scores.amax(1) - _of_label(scores, labels)


def _squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def _distances(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().flatten(1).mean(1)


def _binary_hinge(score: Tensor, sign: Tensor) -> Tensor:
    return (1 - sign * score).clamp(min=0)


def _binary_logistic(score: Tensor, sign: Tensor) -> Tensor:
    return functional.softplus(-sign * score)


def _binary_perceptron(score: Tensor, sign: Tensor) -> Tensor:
    # clamp rather than relu: at a score of 0 its derivative is 1, without which zero weights would never change.
    return (-sign * score).clamp(min=0)


OF_CLASSES: Mapping[str, PerSample] = MappingProxyType(
    {
        "cross-entropy": _cross_entropy,
        "nll": _nll,
        # Of a one-hot distribution; as a sum over classes it would be NaN where a probability rounds to 0.
        "kl": _nll,
        "hinge": _hinge,
        "logistic": _cross_entropy,
        "perceptron": _perceptron,
        "mse": lambda scores, labels: _squares(scores, _one_hot(scores, labels)),
        "l1": lambda scores, labels: _distances(scores, _one_hot(scores, labels)),
    }
)
OF_SINGLE_SCORE: Mapping[str, PerSample] = MappingProxyType(
    {"hinge": _binary_hinge, "logistic": _binary_logistic, "perceptron": _binary_perceptron}
)
OF_VALUES: Mapping[str, PerSample] = MappingProxyType({"mse": _squares, "l1": _distances})
