"""From indices of samples to what strategies train on: forward passes on batches, whose losses are counted."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from allreduce_sgd.data.sampling import evaluation_share, share
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.metrics import Tally
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.precision import autocast

__all__ = ["Feed"]

_EVALUATION_BATCH = 512


class Feed:
    """Makes shares of mini-batches of `dataset`, and evaluates models on its test set.

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
    def evaluate(self, model: nn.Module, rank: int, size: int, virtual_ranks: int = 1) -> Tally:
        """Evaluate `model` on this rank's part of the test set: exact sums over all ranks, nothing padded.

        So many `virtual_ranks` of this rank have batches of their own, which do not depend on who has them.
        """
        tally = Tally()
        loss = self.loss.of_evaluation()
        model.eval()
        for virtual in range(rank * virtual_ranks, (rank + 1) * virtual_ranks):
            part = evaluation_share(len(self.dataset.test), virtual, size * virtual_ranks)
            for start in range(part.start, part.stop, _EVALUATION_BATCH):
                indices = torch.arange(start, min(start + _EVALUATION_BATCH, part.stop))
                inputs, labels = self.dataset.test.batch(indices)
                outputs, targets, value = self._forward(model, inputs, labels, loss)
                tally.add(value, loss.weight(labels), loss.correct(outputs, targets), loss.count(labels))
        model.train()
        return tally

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
