"""The trainer: runs a strategy over the sample order, evaluates the consensus model, logs and checkpoints.

The sample order, the seed and the global mini-batch say what is computed, and the number of ranks only by how many it
is shared out: step s of an epoch takes the same samples on any number of ranks.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from allreduce_sgd import checkpoint
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.config import Config
from allreduce_sgd.data.sampling import Sampler, share
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.display import Display
from allreduce_sgd.errors import located, quoted
from allreduce_sgd.feed import Feed
from allreduce_sgd.gradients.check_sync import SyncCheck
from allreduce_sgd.metrics import MetricsLog, Totals
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.optim.states import check_state
from allreduce_sgd.random_state import random_state, restore_random_state
from allreduce_sgd.report import Evaluation, Position, Report
from allreduce_sgd.stopping import StopPoint, stop_point
from allreduce_sgd.stopwatch import Stopwatch
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.pace import Pace, Ticket
from allreduce_sgd.trace import StepTrace

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
        self.sampler = sampler
        self.total_steps = total_steps
        self.predicted = predicted
        self.folder = folder
        self.stop_asked = stop_asked
        self.step = 0
        self.samples = 0
        self.reached_target = False
        self.preempted = False
        self._logged_step = self._saved_step = -1
        self.evaluation: Evaluation | None = None
        virtual = config.strategy.virtual_ranks
        self._virtual_ranks = 1 if virtual is None else virtual // comm.size
        everyone = strategy.everyone
        self._watch = Stopwatch(comm, device, [] if everyone is comm else [everyone])
        training = config.training
        self._feed = Feed(dataset, loss, device, training.precision, training.accumulate)
        self._slowed = config.strategy.slowed_by(everyone.rank)
        self._epoch_totals = Totals()
        self._train_loss: float | None = None
        self._report = Report(strategy, self._watch, log)
        every = config.gradients.check_sync
        self._sync_check = None if every is None else SyncCheck(strategy.model, comm, every)
        self._trace: StepTrace | None = None

    def fit(self) -> dict[str, Any] | None:
        """Train to the end, and return the figures of the summary. The model then is the consensus of all ranks.

        Returns None where `stop_asked` ended training before: then the last checkpoint holds everything.
        """
        self.strategy.model.train()
        self._report.begin()
        if self.config.run.trace is not None:
            # Past what the first steps do only once, and with an average in it where these are periodic.
            period = self.config.strategy.steps_between
            traced = min(self.step + period * max(2, -(-8 // period)), self.total_steps)
            self._trace = StepTrace(
                Path(self.config.run.trace), traced, self.strategy.model, self.strategy.optimizer, self.comm
            )
        stop = stop_point(self.comm, self.stop_asked, self.step)
        with Display(self.comm.rank == 0, self.total_steps, self.step) as display:
            while self.step < self.total_steps and not self.reached_target:
                with self._watch.training():
                    if self.strategy.pace is None:
                        self._train_until_due(stop, display)
                    else:
                        self._train_at_own_pace(self.strategy.pace, display)
                if self._evaluation_due():
                    self._evaluate(display)
                if self._checkpoint_due() and self._saved_step != self.step:
                    self._save()
                if self.preempted and self.step < self.total_steps and not self.reached_target:
                    # The model is of no use any more, but ranks that serve must be told.
                    self.strategy.finish()
                    return None
        if self.evaluation is None or self.evaluation.step != self.step:
            self._evaluate(None)
        self.strategy.finish()
        assert self.evaluation is not None
        return self._report.summary(
            self._position, self.config, self.evaluation, self._train_loss, self.global_batch_size, self.reached_target
        )

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
            "global_batch_size": self.global_batch_size,
            "predicted": self.predicted,
            "threads": torch.get_num_threads(),
            "world_size": self.strategy.everyone.size,
            "servers": self.strategy.servers,
            "backend": self.comm.backend,
            "algorithm": self.comm.algorithm,
            "algorithm_table": self.strategy.everyone.algorithm_table,
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
        sharded = self.strategy.sharded
        if sharded is None:
            check_state(self.strategy.optimizer, shared["optimizer"])
        else:
            check_state(sharded.inner, shared["optimizer"], sharded.whole_parameters)
        self.strategy.optimizer.load_state_dict(shared["optimizer"])
        _check_kinds("schedule", shared["schedule"], self.schedule.state_dict())
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
        # The saved rate is that of the old end of training, which a resumed run may have moved.
        self._set_rate(self.schedule.last_epoch)
        if own is None:
            self.strategy.restart(self.step)
            torch.manual_seed(self.config.training.seed + 1_000_003 * (1 + self.comm.rank) + self.step)
        else:
            self.strategy.load_state_dict(own["strategy"])
            restore_random_state(own["random"], self.device)

    def _train_until_due(self, stop: StopPoint, display: Display) -> None:
        """Take steps until something other than training is to be done."""
        while True:
            if stop.reached(self.step):
                self.preempted = True
                if self._logged_step != self.step:
                    self._log_training(display, epoch_ended=False)
                return
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
        self._take_step(self.step, self._share(epoch, position))
        self.schedule.step()
        self.step += 1
        self.samples += self.sampler.global_count(position)
        if self._sync_check is not None and self.strategy.in_agreement:
            self._sync_check.after_step(self.step)

    def _take_step(self, step: int, share: Share) -> None:
        traffic = self.strategy.everyone.traffic
        with (
            located(f"step {step + 1}"),
            nullcontext() if self._trace is None else self._trace.around(step + 1),
            nullcontext() if self._slowed == 1 else self._slowly(),
            traffic.attributed(self.strategy.signal),
        ):
            self.strategy.step(share)

    @contextmanager
    def _slowly(self) -> Iterator[None]:
        """Take longer for what is computed within, by the factor of --straggler."""
        started, waited = time.perf_counter(), self._watch.waited_seconds()
        yield
        computing = time.perf_counter() - started - (self._watch.waited_seconds() - waited)
        time.sleep((self._slowed - 1) * computing)

    def _share(self, epoch: int, position: int) -> Share:
        """Return this rank's share of a mini-batch; in method dmb what exceeds the batch is only predicted."""
        rank, size = self.comm.rank, self.comm.size
        count = self.sampler.global_count(position)
        learnt = min(count, self.global_batch_size)
        if self.config.strategy.virtual_ranks is not None:
            indices, each = self.sampler.indices(epoch, position, 0, 1), self._virtual_ranks
            own = [share(count, virtual, size * each) for virtual in range(rank * each, (rank + 1) * each)]
            shards = [self._feed.share(indices[part], count) for part in own]
            return Share([], sum(shard.samples for shard in shards), count, shards=shards)
        if learnt == count:
            return self._feed.share(self.sampler.indices(epoch, position, rank, size), count)
        indices = self.sampler.indices(epoch, position, 0, 1)
        predicted = indices[learnt:][share(count - learnt, rank, size)]
        return self._feed.share(indices[:learnt][share(learnt, rank, size)], learnt, predicted)

    @property
    def global_batch_size(self) -> int:
        """The samples of all ranks from whose gradients a step is made."""
        return self.sampler.global_batch_size - self.predicted

    def _train_at_own_pace(self, pace: Pace, display: Display) -> None:
        """Take steps, as many as this rank comes to, up to the next at which all ranks are needed."""
        first, until, samples = self.step, self._next_due(), self.samples
        in_epoch = self.sampler.steps_per_epoch
        if first % in_epoch == 0:
            self._epoch_totals = Totals()
        before = self._epoch_totals
        logged = Totals()
        pace.open(first, until)
        while (ticket := self._take_ticket(pace)) is not None:
            self._set_rate(ticket.step)
            if ticket.step > self.step:
                display.step(ticket.step - self.step)
                every = self.config.run.log_every
                # A slow rank may see no ticket of the very step.
                due = ticket.step // every > self.step // every
                self.step = ticket.step
                if due:
                    totals, _ = Totals.of(pace.totals)
                    self.samples = samples + totals.samples
                    self._report.training(self._position, totals - logged, {}, display)
                    logged = totals
            epoch, position = divmod(ticket.step, in_epoch)
            indices = self.sampler.indices(epoch, position, ticket.part, self.comm.size)
            self._take_step(ticket.step, self._feed.share(indices, self.sampler.global_count(position)))
        stood = pace.close()
        display.step(stood - self.step)
        self.step = stood
        self._set_rate(stood)
        self.samples = samples + sum(self.sampler.global_count(step % in_epoch) for step in range(first, stood))
        totals, self.preempted = Totals.of(pace.totals)
        self._epoch_totals = before + totals
        if stood % in_epoch == 0 or self._train_loss is None or stood < in_epoch:
            self._train_loss = self._epoch_totals.mean_loss
        with self.comm.traffic.attributed("logging"):
            _, sums = self._feed.tally.reduce(self.comm, self.strategy.measures())
        self._report.training(self._position, totals - logged, sums, display)

    def _take_ticket(self, pace: Pace) -> Ticket | None:
        report = self._feed.tally.take(self.stop_asked()).tolist()
        with self.strategy.everyone.traffic.attributed("tickets"):
            return pace.take(report)

    def _next_due(self) -> int:
        """Return the next step after which all ranks are needed, at the latest the last of the epoch."""
        epoch = self.sampler.steps_per_epoch
        dues = [every for every in (self.config.training.evaluate_every, self.config.run.checkpoint_every) if every]
        return min(self.total_steps, *((self.step // every + 1) * every for every in [epoch, *dues]))

    def _set_rate(self, step: int) -> None:
        """Make the learning rate that of this step, whichever came before."""
        self.schedule.last_epoch = step
        rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, (base, factor) in zip(self.strategy.optimizer.param_groups, rates, strict=True):
            group["lr"] = base * factor(step)

    def _log_training(self, display: Display, epoch_ended: bool) -> None:
        with self.comm.traffic.attributed("logging"), located(f"log of step {self.step}"):
            totals, sums = self._feed.tally.reduce(self.comm, self.strategy.measures())
        self._logged_step = self.step
        self._epoch_totals += totals
        if epoch_ended or self._train_loss is None or self.step < self.sampler.steps_per_epoch:
            self._train_loss = self._epoch_totals.mean_loss
        self._report.training(self._position, totals, sums, display)

    def _evaluate(self, display: Display | None) -> None:
        """Evaluate the consensus model on the test set. All ranks must call; all get the same figures."""
        with (
            located(f"evaluation after step {self.step}"),
            self.strategy.everyone.traffic.attributed("evaluation"),
            self.comm.traffic.attributed("evaluation"),
        ):
            with self.strategy.consensus():
                tally = self._feed.evaluate(self.strategy.model, self.comm.rank, self.comm.size, self._virtual_ranks)
            totals, _ = tally.reduce(self.comm)
        test_loss = float("nan") if totals.mean_loss is None else totals.mean_loss
        self.evaluation = Evaluation(self.step, test_loss, totals.accuracy)
        self.reached_target |= self._reaches_target(self.evaluation)
        self._report.evaluation(self._position, self.evaluation, self._train_loss, display)

    @property
    def _position(self) -> Position:
        return Position(self.step, self.step / self.sampler.steps_per_epoch, self.samples)

    def _reaches_target(self, evaluation: Evaluation) -> bool:
        accuracy, loss = self.config.training.target_accuracy, self.config.training.target_loss
        accurate = accuracy is not None and (evaluation.test_accuracy or 0.0) >= accuracy
        return accurate or (loss is not None and evaluation.test_loss <= loss)

    def _evaluation_due(self) -> bool:
        if self.evaluation is not None and self.evaluation.step == self.step:
            return False
        every = self.config.training.evaluate_every or self.sampler.steps_per_epoch
        return self.step == self.total_steps or self.step % every == 0

    def _checkpoint_due(self) -> bool:
        every = self.config.run.checkpoint_every
        ended = self.step == self.total_steps or self.reached_target or self.preempted
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
