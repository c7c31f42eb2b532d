"""The losses, each as a value per sample, so that its mean over any set of samples is exact.

A rank with n of N samples contributes mean * n / N, whatever n, and the sum over ranks is the loss of the whole batch.

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
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.options import LOSSES

__all__ = ["Loss", "build_loss", "loss_name", "output_width"]

_REGRESSION = ("mse", "l1")
_BINARY = ("hinge", "logistic", "perceptron")
# Of models that are not trained by cross-entropy for classes and by mse for a regression.
_OF_MODEL = MappingProxyType({"logistic": "logistic", "sparse-logistic": "logistic", "perceptron": "perceptron"})

_PerSample = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(scores, labels, reduction="none")


def _nll(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.nll_loss(functional.log_softmax(scores, 1), labels, reduction="none")


def _one_hot(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.one_hot(labels, scores.shape[1]).to(scores.dtype)


def _kl(scores: Tensor, labels: Tensor) -> Tensor:
    return functional.kl_div(functional.log_softmax(scores, 1), _one_hot(scores, labels), reduction="none").sum(1)


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


_OF_CLASSES: Mapping[str, _PerSample] = MappingProxyType(
    {
        "cross-entropy": _cross_entropy,
        "nll": _nll,
        "kl": _kl,
        "hinge": _hinge,
        "logistic": _cross_entropy,
        "perceptron": _perceptron,
        "mse": lambda scores, labels: _squares(scores, _one_hot(scores, labels)),
        "l1": lambda scores, labels: _distances(scores, _one_hot(scores, labels)),
    }
)
_OF_SINGLE_SCORE: Mapping[str, _PerSample] = MappingProxyType(
    {"hinge": _binary_hinge, "logistic": _binary_logistic, "perceptron": _binary_perceptron}
)
_OF_VALUES: Mapping[str, _PerSample] = MappingProxyType({"mse": _squares, "l1": _distances})


@dataclass(frozen=True)
class Loss:
    """A loss by name, for data with `classes` labels, or for a regression if that is None.

    Outputs are (n, C) or (n, positions, C) for targets (n,) or (n, positions); a single score may be (n, 1) or (n,).
    In a regression outputs and targets have one shape, except that (n, 1) and (n,) agree.
    """

    name: str
    classes: int | None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over samples (and positions), a scalar; 0 for an empty batch, still with a gradient (of zeros).

        Raises:
            ConfigError: the shapes of outputs and targets do not fit each other or the loss.
        """
        if outputs.dtype in (torch.bfloat16, torch.float16):
            # Scores from mixed precision: the loss itself needs more digits than they have.
            outputs = outputs.float()
        per_sample = self._per_sample(outputs, targets)
        return per_sample.mean() if per_sample.numel() else outputs.sum()

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """How many predictions are right, a scalar int64 tensor; None in a regression.

        The prediction is the class of the largest score, or class 1 if a single score is positive.
        """
        if self.classes is None:
            return None
        scores, labels = self._flat(outputs, targets)
        predicted = (scores.squeeze(1) > 0).long() if scores.shape[1] == 1 else scores.argmax(1)
        return (predicted == labels).sum()

    def count(self, targets: Tensor) -> int:
        """How many predictions `targets` asks for: one per label, of which a text has one per position."""
        return len(targets) if self.classes is None else targets.numel()

    def _per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.classes is None:
            return _OF_VALUES[self.name](*self._agreeing(outputs, targets))
        scores, labels = self._flat(outputs, targets)
        if scores.shape[1] == 1:
            return _OF_SINGLE_SCORE[self.name](scores.squeeze(1), labels.to(scores.dtype) * 2 - 1)
        return _OF_CLASSES[self.name](scores, labels)

    def _flat(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.shape == targets.shape:
            outputs = outputs[..., None]
        width = outputs.shape[-1] if outputs.ndim else 0
        single = width == 1 and self.classes == 2 and self.name in _BINARY
        if outputs.shape[:-1] != targets.shape or not (width == self.classes or single):
            raise self._misfit(outputs, targets)
        return outputs.reshape(-1, width), targets.reshape(-1)

    def _agreeing(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # Without this, (n, 1) and (n,) would silently broadcast to (n, n).
        if outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1:
            outputs = outputs.squeeze(-1)
        elif targets.ndim == outputs.ndim + 1 and targets.shape[-1] == 1:
            targets = targets.squeeze(-1)
        if outputs.shape != targets.shape or outputs.ndim == 0:
            raise self._misfit(outputs, targets)
        return (outputs, targets) if outputs.ndim > 1 else (outputs[:, None], targets[:, None])

    def _misfit(self, outputs: Tensor, targets: Tensor) -> ConfigError:
        what = "a regression" if self.classes is None else f"{self.classes} classes"
        return ConfigError(
            f"--loss {self.name}: the model's outputs {tuple(outputs.shape)} do not fit the targets "
            f"{tuple(targets.shape)} of {what}"
        )


def loss_name(name: str | None, model_name: str, classes: int | None) -> str:
    """`name` in lower case, or if it is None the loss that fits the model and the data.

    Raises:
        ConfigError: it is unknown, or needs classes where the data set has none.
    """
    if classes is None:
        if name is None and model_name.lower() in _OF_MODEL:
            raise ConfigError(
                f"--model {model_name} needs classes, but the --dataset is a regression; "
                "allowed are linear, mlp, cnn, resnet20, resnet18 and your own"
            )
        allowed: tuple[str, ...] = _REGRESSION
        chosen, reason = (name or "mse").lower(), " for a --dataset with floating targets"
    else:
        allowed = LOSSES
        chosen, reason = (name or _OF_MODEL.get(model_name.lower(), "cross-entropy")).lower(), ""
    if chosen not in allowed:
        raise ConfigError(f"--loss {name}: allowed{reason} are {', '.join(allowed)}")
    return chosen


def build_loss(name: str | None, model_name: str, classes: int | None) -> Loss:
    """The loss for `--loss` (None: what fits), `--model` and the data set's classes (None: regression).

    Raises:
        ConfigError: it is unknown, or does not suit the targets.
    """
    return Loss(loss_name(name, model_name, classes), classes)


def output_width(name: str | None, model_name: str, classes: int | None) -> int:
    """How many outputs a model needs per sample (or position): 1 for a regression or a binary score, else `classes`.

    Raises:
        ConfigError: as `build_loss`.
    """
    chosen = loss_name(name, model_name, classes)
    return 1 if classes is None or (classes == 2 and chosen in _BINARY) else classes
