"""The trainer: has a strategy take steps to the end, and evaluates, logs and checkpoints on the way.

What a step is stands in `stepper.py`, what follows from an evaluation in `evaluator.py`, and which model a run ends
with in `selection/`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from allreduce_sgd import checkpoint
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.config import Config
from allreduce_sgd.data.sampling import Sampler
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.display import Display
from allreduce_sgd.errors import located, quoted
from allreduce_sgd.evaluator import Evaluator
from allreduce_sgd.gradients.check_sync import SyncCheck
from allreduce_sgd.metrics import MetricsLog, Totals
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.optim.plateau import build_plateau, set_rate
from allreduce_sgd.optim.states import check_state
from allreduce_sgd.progress import Progress
from allreduce_sgd.random_state import random_state, restore_random_state
from allreduce_sgd.report import Report
from allreduce_sgd.selection.batch_statistics import recompute_statistics
from allreduce_sgd.selection.build import build_final_model
from allreduce_sgd.stepper import build_stepper
from allreduce_sgd.stopping import StopPoint, stop_point
from allreduce_sgd.stopwatch import Stopwatch
from allreduce_sgd.strategies.base import Strategy
from allreduce_sgd.strategies.pace import Pace
from allreduce_sgd.strategies.precision import autocast

__all__ = ["Trainer"]


class Trainer:
    """Trains by `strategy` until the configured end. All ranks that train construct it and call `fit` together.

    `folder` is where checkpoints go, None for none; `log` is rank 0's, None on other ranks or for no log;
    `total_steps` is the end, in optimizer steps, `predicted` how many samples of a step are only predicted. Where
    `stop_asked` says yes on any rank, all ranks soon end at one step, write a checkpoint and stop (`stopping.py`).
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
        sampler: Sampler,
        total_steps: int,
        predicted: int,
        folder: Path | None,
        log: MetricsLog | None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.comm = comm
        self.device = device
        self.dataset = dataset
        self.strategy = strategy
        self.schedule = schedule
        self.total_steps = total_steps
        self.folder = folder
        self.stop_asked = stop_asked
        self.preempted = False
        self._predicted = predicted
        pause_epochs = config.run.pause_after_epochs
        self._pause_step = pause_epochs * sampler.steps_per_epoch if pause_epochs else config.run.pause_after_steps
        self._logged_step = self._saved_step = -1
        everyone = strategy.everyone
        self._watch = Stopwatch(comm, device, [] if everyone is comm else [everyone])
        self._stepper = build_stepper(config, strategy, device, dataset, loss, sampler, predicted, self._watch)
        self._feed = self._stepper.feed
        self._progress = Progress(sampler.steps_per_epoch)
        self._final = build_final_model(config.selection, strategy, total_steps, self._recompute_statistics)
        self._evaluator = Evaluator(config, comm, self._feed, self._final, folder, self._stepper.virtual_ranks)
        self._plateau = build_plateau(config.optimizer, schedule)
        self._report = Report(strategy, self._watch, log)
        every = config.gradients.check_sync
        self._sync_check = None if every is None else SyncCheck(strategy.model, comm, every)

    @property
    def step(self) -> int:
        """How many optimizer steps have been taken."""
        return self._progress.step

    @property
    def global_batch_size(self) -> int:
        """The samples of all ranks from whose gradients a step is made."""
        return self._stepper.global_batch_size

    def fit(self) -> dict[str, Any] | None:
        """Train to the end, and return the figures of the summary. The strategy's model then is the final one.

        Returns None where `stop_asked` or a pause ended training before: then the last checkpoint holds everything.
        """
        self.strategy.model.train()
        self._report.begin()
        if self.config.run.trace is not None:
            self._stepper.record(Path(self.config.run.trace), self.step, self.total_steps)
        stop = stop_point(self.comm, self.stop_asked, self.step)
        with Display(self.comm.rank == 0, self.total_steps, self.step) as display:
            while not self._ended:
                with self._watch.training():
                    if self._at_pause:
                        # A resumed run that is there already.
                        pass
                    elif self.strategy.pace is None:
                        self._train_until_due(stop, display)
                    else:
                        self._train_at_own_pace(self.strategy.pace, display)
                self.preempted |= self._at_pause
                if self._evaluation_due():
                    self._evaluate(display)
                if self._checkpoint_due() and self._saved_step != self.step:
                    self._save()
                if self.preempted and not self._ended:
                    # The model is of no use any more, but ranks that serve must be told.
                    self.strategy.finish()
                    return None
        if self._evaluator.last is None or self._evaluator.last.step != self.step:
            self._evaluate(None)
        final = self._evaluator.finish()
        return self._report.summary(
            self._progress.position,
            self.config,
            final,
            self._evaluator.conclusions(),
            self._progress.train_loss,
            self.global_batch_size,
        )

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (what all ranks share, what this rank has of its own). All ranks must call."""
        with self.strategy.consensus():
            model = {name: value.detach().cpu().clone() for name, value in self.strategy.model.state_dict().items()}
        shared = {
            "model": model,
            "optimizer": self.strategy.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "plateau": None if self._plateau is None else self._plateau.state_dict(),
            **self._progress.state_dict(),
            "global_batch_size": self.global_batch_size,
            "predicted": self._predicted,
            "threads": torch.get_num_threads(),
            "world_size": self.strategy.everyone.size,
            "servers": self.strategy.servers,
            "backend": self.comm.backend,
            "algorithm": self.comm.algorithm,
            "algorithm_table": self.strategy.everyone.algorithm_table,
            "configuration": self.config.flat(),
            "watch": self._watch.state_dict(),
            "evaluations": self._evaluator.state_dict(),
            "final_model": self._final.state_dict(),
            "scaling": None if self.strategy.scaling is None else self.strategy.scaling.state_dict(),
        }
        own = {
            "random": random_state(self.device),
            "strategy": self.strategy.state_dict(),
            "final_model": self._final.own_state_dict(),
        }
        return shared, own

    def load_state_dict(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint; `own` is None where this rank has no state of its own in it (another rank count)."""
        self.strategy.model.load_state_dict(shared["model"])
        sharded = self.strategy.sharded
        if sharded is None:
            check_state(self.strategy.optimizer, shared["optimizer"])
        else:
            check_state(sharded.inner, shared["optimizer"], sharded.whole_parameters)
        self.strategy.optimizer.load_state_dict(shared["optimizer"])
        _check_kinds("schedule", shared["schedule"], self.schedule.state_dict())
        self.schedule.load_state_dict(shared["schedule"])
        if self._plateau is not None:
            self._plateau.load_state_dict(shared["plateau"])
        self._progress.load_state_dict(shared)
        if self.strategy.scaling is not None:
            self.strategy.scaling.load_state_dict(shared["scaling"])
        self._watch.load_state_dict(shared["watch"])
        self._evaluator.load_state_dict(shared["evaluations"])
        # The saved rate is that of the old end of training, which a resumed run may have moved.
        set_rate(self.schedule, self.schedule.last_epoch)
        if own is None:
            self.strategy.restart(self.step)
            torch.manual_seed(self.config.training.seed + 1_000_003 * (1 + self.comm.rank) + self.step)
        else:
            self.strategy.load_state_dict(own["strategy"])
            restore_random_state(own["random"], self.device)
        self._final.load_state_dict(shared["final_model"], None if own is None else own["final_model"])

    def _recompute_statistics(self, model: nn.Module) -> None:
        training, parts = self.config.training, self._stepper.virtual_ranks or 1
        with autocast(training.precision, self.device):
            recompute_statistics(model, self._feed.training_inputs, self.comm, training.seed, parts)

    def _train_until_due(self, stop: StopPoint, display: Display) -> None:
        """Take steps until something other than training is to be done."""
        progress = self._progress
        while True:
            if stop.reached(progress.step):
                self.preempted = True
                if self._logged_step != progress.step:
                    self._log_training(display)
                return
            self._train_one_step()
            display.step(1)
            # Also before a checkpoint: what is not yet logged would be missing from a resumed run's figures.
            if progress.step % self.config.run.log_every == 0 or progress.between_epochs or self._checkpoint_due():
                self._log_training(display)
            if progress.between_epochs:
                self._end_epoch(display)
            if self._evaluation_due() or self._checkpoint_due():
                return

    def _train_one_step(self) -> None:
        progress = self._progress
        progress.begin_step()
        self._stepper.take(progress.step)
        self.schedule.step()
        self._final.after_step()
        progress.samples += self._stepper.samples(progress.step)
        progress.step += 1
        if self._sync_check is not None and self.strategy.in_agreement:
            self._sync_check.after_step(progress.step)

    def _train_at_own_pace(self, pace: Pace, display: Display) -> None:
        """Take steps, as many as this rank comes to, up to the next at which all ranks are needed."""
        progress, every = self._progress, self.config.run.log_every
        first, samples = progress.step, progress.samples
        progress.begin_step()
        logged = Totals()
        pace.open(first, self._next_due())
        for ticket in self._stepper.tickets(pace, self.stop_asked):
            set_rate(self.schedule, ticket.step)
            if ticket.step > progress.step:
                display.step(ticket.step - progress.step)
                # A slow rank may see no ticket of the very step.
                due = ticket.step // every > progress.step // every
                progress.step = ticket.step
                if due:
                    totals, _ = Totals.of(pace.totals)
                    progress.samples = samples + totals.samples
                    self._report.training(progress.position, totals - logged, {}, display)
                    logged = totals
            self._stepper.take_ticket(ticket)
            self._final.after_step()
        stood = pace.close()
        display.step(stood - progress.step)
        progress.step = stood
        set_rate(self.schedule, stood)
        progress.samples = samples + sum(self._stepper.samples(step) for step in range(first, stood))
        totals, self.preempted = Totals.of(pace.totals)
        progress.add(totals)
        with self.comm.traffic.attributed("logging"):
            _, sums = self._feed.tally.reduce(self.comm, self.strategy.measures())
        self._report.training(progress.position, totals - logged, sums, display)
        if progress.between_epochs and stood > first:
            self._end_epoch(display)

    def _next_due(self) -> int:
        """Return the next step after which all ranks are needed, at the latest the last of the epoch."""
        epoch = self._progress.steps_per_epoch
        dues = [every for every in (self.config.training.evaluate_every, self.config.run.checkpoint_every) if every]
        end = min(self.total_steps, self._pause_step or self.total_steps)
        return min(end, *((self.step // every + 1) * every for every in [epoch, *dues]))

    def _log_training(self, display: Display) -> None:
        with self.comm.traffic.attributed("logging"), located(f"log of step {self.step}"):
            totals, sums = self._feed.tally.reduce(self.comm, self.strategy.measures())
        self._logged_step = self.step
        self._progress.add(totals)
        self._report.training(self._progress.position, totals, sums, display)

    def _end_epoch(self, display: Display) -> None:
        """Do what the end of an epoch brings with it, on all ranks."""
        with located(f"end of the epoch after step {self.step}"), self.comm.traffic.attributed("averages of weights"):
            self._final.after_epoch(self.step)
        if self.dataset.validation is None:
            self._look_at(self._progress.train_loss, display)

    def _evaluate(self, display: Display | None) -> None:
        """Evaluate, and do what follows. All ranks must call; all get the same figures."""
        evaluation = self._evaluator.evaluate(self.step)
        self._report.evaluation(self._progress.position, evaluation, self._progress.train_loss, display)
        self._look_at(evaluation.validation_loss, display)

    def _look_at(self, loss: float | None, display: Display | None) -> None:
        """Lower the learning rate where this loss says so."""
        fell = self._plateau is not None and loss is not None and self._plateau.look(loss)
        if fell and display is not None:
            lr = self.strategy.optimizer.param_groups[0]["lr"]
            display.line(f"step {self.step:6d}   the loss falls no more: learning rate lowered to {lr:.3g}")

    @property
    def _ended(self) -> bool:
        return self.step >= self.total_steps or self._evaluator.reached_target or self._evaluator.stopped_early

    @property
    def _at_pause(self) -> bool:
        return self._pause_step is not None and self.step >= self._pause_step

    def _evaluation_due(self) -> bool:
        last = self._evaluator.last
        if last is not None and last.step == self.step:
            return False
        every = self.config.training.evaluate_every or self._progress.steps_per_epoch
        return self.step == self.total_steps or self._at_pause or self.step % every == 0

    def _checkpoint_due(self) -> bool:
        every = self.config.run.checkpoint_every
        ended = self._ended or self.preempted or self._at_pause
        return ended or (every is not None and self.step % every == 0)

    def _save(self) -> None:
        if self.folder is not None:
            everyone = self.strategy.everyone
            with (
                located(f"checkpoint of step {self.step}"),
                everyone.traffic.attributed("checkpoints"),
                self.comm.traffic.attributed("checkpoints"),
            ):
                shared, own = self.state_dict()
                self.strategy.before_checkpoint(self.step)
                checkpoint.save(self.folder, self.step, shared, own, self.config.run.keep_checkpoints, everyone)
        self._saved_step = self.step


def _check_kinds(what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError unless a saved state has the entries of the present one, and of their types."""
    for name in saved.keys() | own.keys():
        if name not in saved or name not in own or type(saved[name]) is not type(own[name]):
            raise ValueError(f"{what}: {quoted(name)} is {quoted(saved.get(name))}")
