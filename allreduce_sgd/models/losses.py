"""The losses, each a mean of values per sample (`per_sample.py`), so that it is exact over any set of samples.

A rank with n of N samples contributes mean * n / N, whatever n, and the sum over ranks is the loss of the whole batch.

Label smoothing E (Szegedy et al. 2015, arXiv 1512.00567) replaces the one-hot distribution of y by
q = (1 - E) onehot(y) + E / C. Cross-entropy, nll and logistic are then -sum_c q_c log p_c (a single score s stands for
the two scores 0 and s), and kl is less by the entropy of q, a constant, so that it has the same gradient.

Class weights w multiply the value of a sample by w_y. In smoothed cross-entropy, nll and logistic each class has its
own, -sum_c w_c q_c log p_c, as in torch's cross_entropy. A sample whose label is the index to ignore has the value 0.

Difference from torch: its mean divides by the sum of w_y over the labels of the batch that count, which differs from
rank to rank, so that means of shares would not add up to that of the batch. Here the mean over all samples is divided
by a constant, the mean of w_y (0 for what is ignored) over the training set. Over the whole training set the two are
equal, and so is the expectation of a mini-batch's loss; torch's is that ratio of two sums, slightly biased.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.class_weights import parse_class_weights
from allreduce_sgd.models.options import LOSSES
from allreduce_sgd.models.per_sample import OF_CLASSES, OF_SINGLE_SCORE, OF_VALUES

__all__ = ["Loss", "build_loss", "loss_name", "output_width"]

_REGRESSION = ("mse", "l1")
_BINARY = ("hinge", "logistic", "perceptron")
_SMOOTHED = ("cross-entropy", "nll", "kl", "logistic")
# Of models that are not trained by cross-entropy for classes and by mse for a regression.
_OF_MODEL = MappingProxyType({"logistic": "logistic", "sparse-logistic": "logistic", "perceptron": "perceptron"})


def _entropy(smoothing: float, classes: int) -> float:
    """Of the smoothed distribution of a label."""
    others = smoothing / classes
    chances = [1 - smoothing + others, *[others] * (classes - 1)]
    return -math.fsum(chance * math.log(chance) for chance in chances if chance > 0)


@dataclass(frozen=True)
class Loss:
    """A loss by name, for data with `classes` labels, or for a regression if that is None.

    Outputs are (n, C) or (n, positions, C) for targets (n,) or (n, positions); a single score may be (n, 1) or (n,).
    In a regression outputs and targets have one shape, except that (n, 1) and (n,) agree.
    """

    name: str
    classes: int | None
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    ignore_index: int | None = None
    mean_weight: float | None = 1.0
    """What the mean is divided by. None: the fraction of this batch's targets that count, as in an evaluation."""
    _on_devices: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over samples (and positions), a scalar; 0 where none counts, still with a gradient (of zeros).

        Raises:
            ConfigError: the shapes of outputs and targets do not fit each other or the loss.
        """
        if outputs.dtype in (torch.bfloat16, torch.float16):
            # Scores from mixed precision: the loss itself needs more digits than they have.
            outputs = outputs.float()
        per_sample = self._per_sample(outputs, targets)
        if not per_sample.numel():
            return outputs.sum()
        if self.mean_weight is None:
            return per_sample.sum() / self._counted(targets).sum().clamp(min=1)
        mean = per_sample.mean()
        return mean if self.mean_weight == 1 else mean / self.mean_weight

    def of_evaluation(self) -> "Loss":
        """The loss to report of a test set: neither smoothed nor weighted, the mean over the targets that count.

        It compares between runs, whatever each of them does to train better.
        """
        mean_weight = 1.0 if self.ignore_index is None else None
        return replace(self, label_smoothing=0.0, class_weights=None, mean_weight=mean_weight)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """How many predictions are right, a scalar int64 tensor; None in a regression.

        The prediction is the class of the largest score, or class 1 if a single score is positive. None is right where
        the target is to be ignored.
        """
        if self.classes is None:
            return None
        scores, labels = self._flat(outputs, targets)
        predicted = (scores.squeeze(1) > 0).long() if scores.shape[1] == 1 else scores.argmax(1)
        right = predicted == labels
        return (right if self.ignore_index is None else right & self._counted(labels)).sum()

    def count(self, targets: Tensor) -> int:
        """How many predictions `targets` asks for: one per label that counts; a text has one label per position."""
        if self.classes is None:
            return len(targets)
        return targets.numel() if self.ignore_index is None else int(self._counted(targets).sum())

    def weight(self, targets: Tensor) -> int:
        """By how much a batch's mean of `of_evaluation` counts beside others: its samples, or its labels that count."""
        return len(targets) if self.ignore_index is None else self.count(targets)

    def _counted(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool) if self.ignore_index is None else labels.ne(self.ignore_index)

    def _per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.classes is None:
            return OF_VALUES[self.name](*self._agreeing(outputs, targets))
        scores, labels = self._flat(outputs, targets)
        if self.ignore_index is None:
            return self._of_labels(scores, labels)
        counted = self._counted(labels)
        values = self._of_labels(scores, labels.masked_fill(~counted, 0))
        return torch.where(counted, values, torch.zeros_like(values))

    def _of_labels(self, scores: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.class_weights is None else self._weights_like(scores, self.class_weights)
        if self.label_smoothing:
            return self._smoothed(scores, labels, weights)
        if scores.shape[1] == 1:
            values = OF_SINGLE_SCORE[self.name](scores.squeeze(1), labels.to(scores.dtype) * 2 - 1)
        else:
            values = OF_CLASSES[self.name](scores, labels)
        return values if weights is None else values * weights[labels]

    def _smoothed(self, scores: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        if scores.shape[1] == 1:
            scores = torch.cat((torch.zeros_like(scores), scores), 1)
        smoothing = self.label_smoothing
        if self.name != "kl":
            return functional.cross_entropy(scores, labels, weights, reduction="none", label_smoothing=smoothing)
        values = functional.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
        values = values - _entropy(smoothing, scores.shape[1])
        return values if weights is None else values * weights[labels]

    def _weights_like(self, scores: Tensor, weights: tuple[float, ...]) -> Tensor:
        # Made once, since a copy to a GPU in every step would wait for it.
        key = scores.device, scores.dtype
        if key not in self._on_devices:
            self._on_devices[key] = torch.tensor(weights, device=scores.device, dtype=scores.dtype)
        return self._on_devices[key]

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


def build_loss(
    name: str | None,
    model_name: str,
    classes: int | None,
    label_smoothing: float = 0.0,
    class_weights: str | None = None,
    ignore_index: int | None = None,
    label_counts: Sequence[int] | None = None,
) -> Loss:
    """The loss for `--loss` (None: what fits), `--model` and the data set's classes (None: regression).

    `class_weights` is a list of numbers with commas, or "balanced". Where it or `ignore_index` is given, so must be
    `label_counts`: how often each class is a label of the training set, then how often a label is ignored.

    Raises:
        ConfigError: the loss is unknown or does not suit the targets, or one of the others does not suit the loss.
    """
    chosen = loss_name(name, model_name, classes)
    if label_smoothing and (classes is None or chosen not in _SMOOTHED):
        raise ConfigError(
            f"--label-smoothing {label_smoothing:g} with --loss {chosen}: only {', '.join(_SMOOTHED)} compare with a "
            "distribution over classes; allowed is 0"
        )
    if class_weights is not None and classes is None:
        raise ConfigError(f"--class-weights {class_weights}: the --dataset is a regression and has no classes")
    if classes is None or (class_weights is None and ignore_index is None):
        return Loss(chosen, classes, label_smoothing)
    if label_counts is None:
        raise ValueError("class weights and ignored labels need the numbers of labels")
    *counts, ignored = label_counts
    if sum(counts) == 0:
        raise ConfigError(f"--ignore-index {ignore_index}: every target of the training set has this value")
    weights = None if class_weights is None else parse_class_weights(class_weights, counts)
    total = math.fsum(count if weights is None else count * weights[label] for label, count in enumerate(counts))
    if total == 0:
        raise ConfigError(f"--class-weights {class_weights}: no class of the training set has a weight above 0")
    return Loss(chosen, classes, label_smoothing, weights, ignore_index, total / (sum(counts) + ignored))


def output_width(name: str | None, model_name: str, classes: int | None) -> int:
    """How many outputs a model needs per sample (or position): 1 for a regression or a binary score, else `classes`.

    Raises:
        ConfigError: as `build_loss`.
    """
    chosen = loss_name(name, model_name, classes)
    return 1 if classes is None or (classes == 2 and chosen in _BINARY) else classes
