"""The trainer: runs a strategy over the sample order, evaluates the consensus model, logs and checkpoints.

The sample order, the seed and the global mini-batch say what is computed, and the number of ranks only by how many it
is shared out: step s of an epoch takes the same samples on any number of ranks.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from allreduce_sgd import checkpoint
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.config import Config
from allreduce_sgd.data.sampling import EpochSampler, evaluation_share, share
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.display import Display, number
from allreduce_sgd.errors import NonFiniteError
from allreduce_sgd.gradients.check_sync import SyncCheck
from allreduce_sgd.gradients.replicate import common_sha256
from allreduce_sgd.metrics import MetricsLog, Tally, Totals
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.random_state import random_state, restore_random_state
from allreduce_sgd.stopwatch import Stopwatch
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.precision import autocast
from allreduce_sgd.trace import StepTrace

__all__ = ["Evaluation", "Trainer"]

_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Evaluation:
    """The consensus model on the whole test set: exact sums over all ranks, nothing padded."""

    step: int
    test_loss: float
    test_accuracy: float | None


class Trainer:
    """Trains by `strategy` until the configured end. All ranks construct it and call `fit` together.

    `folder` is where checkpoints go, None for none; `log` is rank 0's, None on other ranks or for no log;
    `total_steps` is the end, in optimizer steps. Where `stop_asked` says yes on any rank at a logged step, all ranks
    write a checkpoint and stop.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        device: torch.device,
        dataset: Dataset,
        loss: Loss,
        strategy: Strategy,
        schedule: LambdaLR,
        sampler: EpochSampler,
        total_steps: int,
        folder: Path | None,
        log: MetricsLog | None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.comm = comm
        self.device = device
        self.dataset = dataset
        self.loss = loss
        self.strategy = strategy
        self.schedule = schedule
        self.sampler = sampler
        self.total_steps = total_steps
        self.folder = folder
        self.log = log
        self.stop_asked = stop_asked
        self.step = 0
        self.samples = 0
        self.reached_target = False
        self.preempted = False
        self.evaluation: Evaluation | None = None
        self._watch = Stopwatch(comm, device)
        self._tally = Tally()
        self._epoch_totals = Totals()
        self._train_loss: float | None = None
        self._logged = (0, 0.0)
        every = config.gradients.check_sync
        self._sync_check = None if every is None else SyncCheck(strategy.model, comm, every)
        self._trace: StepTrace | None = None

    def fit(self) -> dict[str, Any] | None:
        """Train to the end, and return the figures of the summary. The model then is the consensus of all ranks.

        Returns None where `stop_asked` ended training before: then the last checkpoint holds everything.
        """
        self.strategy.model.train()
        if self.config.run.trace is not None:
            # Past what the first steps do only once, and with an average in it where these are periodic.
            traced = min(self.step + 2 * self.config.strategy.period, self.total_steps)
            self._trace = StepTrace(
                Path(self.config.run.trace), traced, self.strategy.model, self.strategy.optimizer, self.comm
            )
        with Display(self.comm.rank == 0, self.total_steps, self.step) as display:
            self._logged = (self.samples, self._watch.train_seconds)
            while self.step < self.total_steps and not self.reached_target:
                with self._watch.training():
                    self._train_until_due(display)
                if self._evaluation_due():
                    self._evaluate(display)
                if self._checkpoint_due():
                    self._save()
                if self.preempted and self.step < self.total_steps and not self.reached_target:
                    return None
        if self.evaluation is None or self.evaluation.step != self.step:
            self._evaluate(None)
        self.strategy.finish()
        return self._summary()

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (what all ranks share, what this rank has of its own). All ranks must call."""
        with self.strategy.consensus():
            model = {name: value.detach().cpu().clone() for name, value in self.strategy.model.state_dict().items()}
        shared = {
            "model": model,
            "optimizer": self.strategy.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "global_batch_size": self.sampler.global_batch_size,
            "threads": torch.get_num_threads(),
            "world_size": self.comm.size,
            "backend": self.comm.backend,
            "algorithm": self.comm.algorithm,
            "algorithm_table": self.comm.algorithm_table,
            "configuration": self.config.flat(),
            "watch": self._watch.state_dict(),
            "epoch_totals": list(vars(self._epoch_totals).values()),
            "train_loss": self._train_loss,
            "evaluation": None if self.evaluation is None else list(vars(self.evaluation).values()),
            "scaling": None if self.strategy.scaling is None else self.strategy.scaling.state_dict(),
        }
        return shared, {"random": random_state(self.device), "strategy": self.strategy.state_dict()}

    def load_state_dict(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; `own` is None where this rank has no state of its own in it (another rank count)."""
        self.strategy.model.load_state_dict(shared["model"])
        self.strategy.optimizer.load_state_dict(shared["optimizer"])
        self.schedule.load_state_dict(shared["schedule"])
        self.step, self.samples = shared["step"], shared["samples"]
        if self.strategy.scaling is not None:
            self.strategy.scaling.load_state_dict(shared["scaling"])
        self._watch.load_state_dict(shared["watch"])
        self._epoch_totals = Totals(*shared["epoch_totals"])
        self._train_loss = shared["train_loss"]
        if shared["evaluation"] is not None:
            self.evaluation = Evaluation(*shared["evaluation"])
            # By the present options: a resumed run may have another target.
            self.reached_target = self._reaches_target(self.evaluation)
        for group, base, factor in zip(
            self.strategy.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            # The saved rate is that of the old end of training, which a resumed run may have moved.
            group["lr"] = base * factor(self.schedule.last_epoch)
        if own is None:
            self.strategy.restart()
            torch.manual_seed(self.config.training.seed + 1_000_003 * (1 + self.comm.rank) + self.step)
        else:
            self.strategy.load_state_dict(own["strategy"])
            restore_random_state(own["random"], self.device)

    def _train_until_due(self, display: Display) -> None:
        """Take steps until something other than training is to be done."""
        while True:
            self._train_one_step()
            display.step(1)
            epoch_ended = self.step % self.sampler.steps_per_epoch == 0
            # Also before a checkpoint: what is not yet logged would be missing from a resumed run's figures.
            if self.step % self.config.run.log_every == 0 or epoch_ended or self._checkpoint_due():
                self._log_training(display, epoch_ended)
            if self._evaluation_due() or self._checkpoint_due():
                return

    def _train_one_step(self) -> None:
        epoch, position = divmod(self.step, self.sampler.steps_per_epoch)
        if position == 0:
            self._epoch_totals = Totals()
        indices = self.sampler.indices(epoch, position, self.comm.rank, self.comm.size)
        global_samples = self.sampler.global_count(position)
        try:
            with nullcontext() if self._trace is None else self._trace.around(self.step + 1):
                self.strategy.step(self._share(indices, global_samples))
        except NonFiniteError as problem:
            raise NonFiniteError(f"step {self.step + 1}: {problem}") from None
        self.schedule.step()
        self.step += 1
        self.samples += global_samples
        if self._sync_check is not None and self.strategy.in_agreement:
            self._sync_check.after_step(self.step)

    def _share(self, indices: Tensor, global_samples: int) -> Share:
        samples = len(indices)
        rounds = self.config.training.accumulate
        pieces = [indices[share(samples, part, rounds)] for part in range(rounds)]
        losses = [self._loss_of(piece, len(piece) / samples) for piece in pieces if len(piece)]
        return Share(losses, samples, global_samples)

    def _loss_of(self, indices: Tensor, fraction: float) -> Callable[[nn.Module], Tensor]:
        def compute(model: nn.Module) -> Tensor:
            outputs, targets, loss = self._forward(model, self.dataset.train.batch(indices))
            self._tally.add(loss, len(indices), self.loss.correct(outputs.detach(), targets), self.loss.count(targets))
            return loss if fraction == 1.0 else loss * fraction

        return compute

    def _forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
        with autocast(self.config.training.precision, self.device):
            outputs = model(inputs)
            return outputs, targets, self.loss(outputs, targets)

    def _log_training(self, display: Display, epoch_ended: bool) -> None:
        totals, self.preempted = self._tally.reduce(self.comm, self.stop_asked())
        self._epoch_totals += totals
        if epoch_ended or self._train_loss is None or self.step < self.sampler.steps_per_epoch:
            self._train_loss = self._epoch_totals.mean_loss
        samples_before, seconds_before = self._logged
        seconds = self._watch.train_seconds
        self._logged = (self.samples, seconds)
        speed = (self.samples - samples_before) / max(seconds - seconds_before, 1e-9)
        display.figures(self.step, totals.mean_loss, totals.accuracy, speed)
        values = {
            "loss": totals.mean_loss,
            "accuracy": totals.accuracy,
            "learning_rate": self.schedule.get_last_lr()[0],
            "samples_per_second": speed,
            **self._watch.communication(),
        }
        if self.strategy.scaling is not None:
            scaling = self.strategy.scaling
            values |= {"loss_scale": scaling.scale, "skipped_steps": scaling.skipped_steps}
        self._write("train", values)

    @torch.no_grad()
    def _evaluate(self, display: Display | None) -> None:
        """Evaluate the consensus model on the test set. All ranks must call; all get the same figures."""
        model = self.strategy.model
        part = evaluation_share(len(self.dataset.test), self.comm.rank, self.comm.size)
        tally = Tally()
        with self.strategy.consensus():
            model.eval()
            for start in range(part.start, part.stop, _EVALUATION_BATCH):
                indices = torch.arange(start, min(start + _EVALUATION_BATCH, part.stop))
                outputs, targets, loss = self._forward(model, self.dataset.test.batch(indices))
                tally.add(loss, len(indices), self.loss.correct(outputs, targets), self.loss.count(targets))
            model.train()
        totals, _ = tally.reduce(self.comm)
        test_loss = float("nan") if totals.mean_loss is None else totals.mean_loss
        self.evaluation = Evaluation(self.step, test_loss, totals.accuracy)
        self.reached_target |= self._reaches_target(self.evaluation)
        self._write("evaluation", {"test_loss": test_loss, "test_accuracy": totals.accuracy})
        if display is not None:
            accuracy = "" if totals.accuracy is None else f"   test accuracy {100 * totals.accuracy:6.2f} %"
            display.line(
                f"step {self.step:6d}   epoch {self.epochs:7.2f}   train loss {number(self._train_loss)}   "
                f"test loss {number(test_loss)}{accuracy}   {self._watch.train_seconds:8.2f} s"
            )

    @property
    def epochs(self) -> float:
        return self.step / self.sampler.steps_per_epoch

    def _reaches_target(self, evaluation: Evaluation) -> bool:
        accuracy, loss = self.config.training.target_accuracy, self.config.training.target_loss
        accurate = accuracy is not None and (evaluation.test_accuracy or 0.0) >= accuracy
        return accurate or (loss is not None and evaluation.test_loss <= loss)

    def _evaluation_due(self) -> bool:
        every = self.config.training.evaluate_every or self.sampler.steps_per_epoch
        return self.step == self.total_steps or self.step % every == 0

    def _checkpoint_due(self) -> bool:
        every = self.config.run.checkpoint_every
        ended = self.step == self.total_steps or self.reached_target or self.preempted
        return ended or (every is not None and self.step % every == 0)

    def _save(self) -> None:
        if self.folder is not None:
            shared, own = self.state_dict()
            checkpoint.save(self.folder, self.step, shared, own, self.config.run.keep_checkpoints, self.comm)

    def _write(self, event: str, values: dict[str, Any]) -> None:
        if self.log is not None:
            times = {"train_seconds": self._watch.train_seconds, "wall_seconds": self._watch.wall_seconds}
            self.log.write(event, self.step, {"epoch": self.epochs, "samples": self.samples, **values, **times})

    def _summary(self) -> dict[str, Any]:
        assert self.evaluation is not None
        communication = self._watch.average_over_ranks()
        train_seconds = self._watch.train_seconds
        return {
            "world_size": self.comm.size,
            "workers": self.comm.size,
            "servers": 0,
            "strategy": self.strategy.name,
            "consensus": self.strategy.consensus_kind,
            "backend": self.comm.backend,
            "algorithm": self.comm.algorithm,
            "steps": self.step,
            "sharded_optimizer": self.strategy.sharded is not None,
            "skipped_steps": self.strategy.skipped_steps(),
            "epochs": self.epochs,
            "samples": self.samples,
            "global_batch_size": self.sampler.global_batch_size,
            "train_loss": self._train_loss,
            "test_loss": self.evaluation.test_loss,
            "test_accuracy": self.evaluation.test_accuracy,
            "target_accuracy": self.config.training.target_accuracy,
            "target_loss": self.config.training.target_loss,
            "reached_target": self.reached_target,
            "train_seconds": train_seconds,
            "wall_seconds": self._watch.wall_seconds,
            "samples_per_second": self.samples / max(train_seconds, 1e-9),
            **communication,
            "seed": self.config.training.seed,
            "parameters_sha256": common_sha256(self.strategy.model, self.comm),
        }
