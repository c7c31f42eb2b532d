"""From indices of samples to what strategies train on: forward passes on batches, whose losses are counted."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from allreduce_sgd.data.label_counts import label_counts
from allreduce_sgd.data.sampling import evaluation_share, share
from allreduce_sgd.data.split import Dataset, Samples
from allreduce_sgd.metrics import Tally
from allreduce_sgd.models.losses import Loss, build_loss
from allreduce_sgd.models.options import ModelOptions
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.precision import autocast

__all__ = ["Feed", "loss_for"]

_EVALUATION_BATCH = 512


class Feed:
    """Makes shares of mini-batches of `dataset`, and evaluates models on its other splits.

    Forward passes run in `precision` on `device`, a rank's samples in `rounds` micro-batches; `tally` collects the
    losses of training.
    """

    def __init__(self, dataset: Dataset, loss: Loss, device: torch.device, precision: str, rounds: int) -> None:
        self.dataset = dataset
        self.loss = loss
        self.tally = Tally()
        self._device = device
        self._precision = precision
        self._rounds = rounds

    def share(self, indices: Tensor, global_samples: int, predicted: Tensor | None = None, *, visit: int = 0) -> Share:
        """Return a rank's share: the samples to learn from, and those that are only `predicted`.

        `visit` (`Sampler.visit`) says how their inputs are augmented.
        """
        samples = len(indices)
        pieces = [indices[share(samples, part, self._rounds)] for part in range(self._rounds)]
        losses = [self._loss_of(piece, len(piece) / samples, visit) for piece in pieces if len(piece)]
        predictions = [] if predicted is None or not len(predicted) else [self._loss_of(predicted, 1.0, visit)]
        return Share(losses, samples, global_samples, predictions)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, rank: int, size: int, virtual_ranks: int = 1, samples: Samples | None = None
    ) -> Tally:
        """Evaluate `model` on this rank's part of `samples` (None: the test set): exact sums over all ranks, nothing
        padded.

        So many `virtual_ranks` of this rank have batches of their own, which do not depend on who has them.
        """
        tally = Tally()
        samples = self.dataset.test if samples is None else samples
        loss = self.loss.of_evaluation()
        model.eval()
        for virtual in range(rank * virtual_ranks, (rank + 1) * virtual_ranks):
            part = evaluation_share(len(samples), virtual, size * virtual_ranks)
            for start in range(part.start, part.stop, _EVALUATION_BATCH):
                indices = torch.arange(start, min(start + _EVALUATION_BATCH, part.stop))
                inputs, labels = samples.batch(indices)
                outputs, targets, value = self._forward(model, inputs, labels, loss)
                tally.add(value, loss.weight(labels), loss.correct(outputs, targets), loss.count(labels))
        model.train()
        return tally

    def training_inputs(self, part: int, parts: int) -> Iterator[Tensor]:
        """Yield the inputs of one of so many parts of the training set, in as many batches as those of the others."""
        samples = len(self.dataset.train)
        own, count = evaluation_share(samples, part, parts), -(-samples // (parts * _EVALUATION_BATCH))
        for each in range(count):
            piece = share(own.stop - own.start, each, count)
            if piece.start < piece.stop:
                indices = torch.arange(own.start + piece.start, own.start + piece.stop)
                yield self.dataset.train.batch(indices)[0].to(self._device, non_blocking=True)

    def _loss_of(self, indices: Tensor, fraction: float, visit: int) -> Callable[[nn.Module], Tensor]:
        def compute(model: nn.Module) -> Tensor:
            inputs, labels = self.dataset.train.batch(indices)
            if self.dataset.augmentation is not None:
                inputs = self.dataset.augmentation(inputs.to(self._device, non_blocking=True), indices, visit)
            outputs, targets, loss = self._forward(model, inputs, labels, self.loss)
            # Labels are counted where they are loaded, so that no step waits for a GPU.
            self.tally.add(loss, len(indices), self.loss.correct(outputs.detach(), targets), self.loss.count(labels))
            return loss if fraction == 1.0 else loss * fraction

        return compute

    def _forward(self, model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = (part.to(self._device, non_blocking=True) for part in (inputs, targets))
        with autocast(self._precision, self._device):
            outputs = model(inputs)
            return outputs, targets, loss(outputs, targets)


def loss_for(options: ModelOptions, dataset: Dataset) -> Loss:
    """Return the loss to train by, weighted as the labels of the training set say.

    Raises:
        ConfigError: the options do not suit one another or the data set.
    """
    weighted = options.class_weights is not None or dataset.ignore_index is not None
    return build_loss(
        options.loss,
        options.model,
        dataset.classes,
        options.label_smoothing,
        options.class_weights,
        dataset.ignore_index,
        label_counts(dataset) if weighted and dataset.classes is not None else None,
    )
