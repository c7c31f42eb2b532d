"""One optimizer step of a run: this rank's share of the mini-batch, on which the strategy trains.

The sample order, the seed and the global mini-batch say what is computed, and the number of ranks only by how many it
is shared out: step s of an epoch takes the same samples on any number of ranks.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.config import Config
from allreduce_sgd.data.sampling import Sampler, share
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.errors import located
from allreduce_sgd.feed import Feed
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.stopwatch import Stopwatch
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.pace import Pace, Ticket
from allreduce_sgd.trace import StepTrace

__all__ = ["Stepper", "build_stepper"]


class Stepper:
    """Has `strategy` take steps with the samples that `sampler` says and `feed` makes into shares.

    `predicted` samples of each step are only predicted (method dmb). `watch` tells how long the strategy has waited for
    others, which does not count where --straggler slows this rank down.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        feed: Feed,
        strategy: Strategy,
        sampler: Sampler,
        predicted: int,
        watch: Stopwatch,
    ) -> None:
        self.feed = feed
        self.strategy = strategy
        self.sampler = sampler
        virtual = config.strategy.virtual_ranks
        self.virtual_ranks = None if virtual is None else virtual // comm.size
        """How many of the virtual ranks this rank is, None without any."""
        self._comm = comm
        self._trace: StepTrace | None = None
        self._period = config.strategy.steps_between
        self._predicted = predicted
        self._slowed = config.strategy.slowed_by(strategy.everyone.rank)
        self._watch = watch

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    @property
    def global_batch_size(self) -> int:
        """The samples of all ranks from whose gradients a step is made."""
        return self.sampler.global_batch_size - self._predicted

    def samples(self, step: int) -> int:
        """Return how many samples all ranks together have in this step of the run."""
        return self.sampler.global_count(step % self.steps_per_epoch)

    def record(self, file: Path, first: int, total_steps: int) -> None:
        """Write a timeline of an early step to `file` once it has been taken; `first` steps were taken before."""
        # Past what the first steps do only once, and with an average in it where these are periodic.
        traced = min(first + self._period * max(2, -(-8 // self._period)), total_steps)
        self._trace = StepTrace(file, traced, self.strategy.model, self.strategy.optimizer, self._comm)

    def take(self, step: int) -> None:
        """Take this step of the run, counted from 0, together with all other ranks."""
        self._take(step, self._share(*divmod(step, self.steps_per_epoch)))

    def take_ticket(self, ticket: Ticket) -> None:
        """Take the part of a step that a ticket gives to this rank alone."""
        epoch, position = divmod(ticket.step, self.steps_per_epoch)
        indices = self.sampler.indices(epoch, position, ticket.part, self._comm.size)
        count, visit = self.sampler.global_count(position), self.sampler.visit(epoch, position)
        self._take(ticket.step, self.feed.share(indices, count, visit=visit))

    def tickets(self, pace: Pace, stop_asked: Callable[[], bool] = lambda: False) -> Iterator[Ticket]:
        """Yield the tickets of the stretch that `pace` has open, to be taken one by one, and report after each."""
        while True:
            report = self.feed.tally.take(stop_asked()).tolist()
            with self.strategy.everyone.traffic.attributed("tickets"):
                ticket = pace.take(report)
            if ticket is None:
                return
            yield ticket

    def _take(self, step: int, share: Share) -> None:
        with (
            located(f"step {step + 1}"),
            nullcontext() if self._trace is None else self._trace.around(step + 1),
            nullcontext() if self._slowed == 1 else self._slowly(),
            self.strategy.everyone.traffic.attributed(self.strategy.signal),
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
        rank, size = self._comm.rank, self._comm.size
        visit = self.sampler.visit(epoch, position)
        count = self.sampler.global_count(position)
        learnt = min(count, self.global_batch_size)
        if self.virtual_ranks is not None:
            indices, each = self.sampler.indices(epoch, position, 0, 1), self.virtual_ranks
            own = [share(count, virtual, size * each) for virtual in range(rank * each, (rank + 1) * each)]
            shards = [self.feed.share(indices[part], count, visit=visit) for part in own]
            return Share([], sum(shard.samples for shard in shards), count, shards=shards)
        if learnt == count:
            return self.feed.share(self.sampler.indices(epoch, position, rank, size), count, visit=visit)
        indices = self.sampler.indices(epoch, position, 0, 1)
        predicted = indices[learnt:][share(count - learnt, rank, size)]
        return self.feed.share(indices[:learnt][share(learnt, rank, size)], learnt, predicted, visit=visit)


def build_stepper(
    config: Config,
    strategy: Strategy,
    device: torch.device,
    dataset: Dataset,
    loss: Loss,
    sampler: Sampler,
    predicted: int,
    watch: Stopwatch | None = None,
) -> Stepper:
    """Build the steps of a run, with their feed; `watch` None: with a stopwatch of their own."""
    comm, everyone, training = strategy.comm, strategy.everyone, config.training
    watch = watch or Stopwatch(comm, device, [] if everyone is comm else [everyone])
    feed = Feed(dataset, loss, device, training.precision, training.accumulate)
    return Stepper(config, comm, feed, strategy, sampler, predicted, watch)
