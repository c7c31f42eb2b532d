"""The anchored exchange: ranks step alone, and every H steps agree on a new common anchor.

Rank i holds x_i, all hold the anchor z. Every H(t) steps (`period.py`) it sends its model; tau steps later, having
gone on meanwhile, it takes over what came of it: z <- Outer(z, z - x̄), x_i <- Merge(x_i, x_i as sent, z). A method is
a row of entries: `local.py`, `slowmo.py`, `bmuf.py`, `diloco.py`, `elastic.py`; how a part of the model travels stands
in `fragment.py`. The mean x̄ weighs ranks by the samples that they have seen since the last exchange, so that unequal
shares count rightly and H = 1 with plain SGD equals synchronous SGD.

Bytes per rank: one all-reduce of the parameters every H steps, 2(P-1)/P n / H a step with the ring. A codec may
compress the signal w_i (z - x_i) instead; with error feedback what it leaves out is added to the next one. Consensus
models are exact all the same.

All parameters that are trained are exchanged, also those that got no gradient; frozen ones are left alone. Between
exchanges a step costs some comparisons and additions of numbers more than one without communication.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import CodecFactory
from allreduce_sgd.compression.error_feedback import ErrorFeedback
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.buckets import Bucket
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import broadcast_tensors, check_same_model
from allreduce_sgd.strategies.base import Share, Strategy, agree_on_buffers, restored
from allreduce_sgd.strategies.fragment import Fragment, copy_quotient, fill, split_evenly
from allreduce_sgd.strategies.inner_state import StateAverage
from allreduce_sgd.strategies.method import Method
from allreduce_sgd.strategies.period import Period
from allreduce_sgd.strategies.precision import LossScaling

__all__ = ["Anchored"]


class Anchored(Strategy):
    """Local steps, with exchanges by `method` when `period` says, taken over `delay` steps after they started.

    The model is exchanged in so many `fragments`, each once a period, in turn. `inner_state` says what becomes of the
    optimizer's state when an exchange is taken over: "keep", "average" (exposed even where the exchange is not) or
    "reset". Of `gradients` it takes the bucket size, whether every rank checks its own gradients for NaN and infinity,
    and what becomes of buffers when the last fragment is taken over. `compression` makes the codec of a bucket.

    One rank alone is serial SGD where the outer step is a plain average; else it makes its outer steps.
    """

    signal = "parameters"

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        period: Period,
        gradients: GradientOptions,
        compression: CodecFactory | None = None,
        scaling: LossScaling | None = None,
        *,
        delay: int = 0,
        fragments: int = 1,
        inner_state: str = "keep",
    ) -> None:
        """Raises ConfigError where exchanges would overtake one another, or options do not fit the method."""
        super().__init__(model, optimizer, comm, clip_norm, scaling)
        self.name = method.name
        self.consensus_kind = method.consensus_kind
        self._method = method
        self._period = period
        self._delay = delay
        self._inner_state = inner_state
        self._check_finite = gradients.check_finite
        self._buffers = gradients.buffers
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._check(fragments, len(trained))
        if comm.size > 1:
            check_same_model(model, comm)
            broadcast_tensors([*model.parameters(), *model.buffers()], comm)
        self._fragments: list[Fragment] = []
        # One rank alone has its own model as the average.
        if comm.size > 1 or not method.averages:
            keeps_sent = delay > 0 or method.early
            self._fragments = [
                Fragment(part, comm, gradients.bucket_mb * 2**20, method, compression, keeps_sent)
                for part in split_evenly(trained, fragments)
            ]
        if method.signal_persists and any(
            isinstance(codec, ErrorFeedback) for fragment in self._fragments for codec in fragment.codecs
        ):
            raise ConfigError(
                f"--error-feedback: in {method.name} what a codec leaves out is there again in the next exchange, and "
                f"must not be added to it; choose --no-error-feedback"
            )
        self._averages = [StateAverage(optimizer, fragment.parameters, comm) for fragment in self._fragments]
        self._step = self._samples = self._global_samples = 0
        self._next: int | None = None
        self._even = True
        self._squared_distance = 0.0
        self._measured = 0
        self._begin()

    @property
    def in_agreement(self) -> bool:
        now = self._samples, self._global_samples
        return all(fragment.base == now for fragment in self._fragments)

    def step(self, share: Share) -> None:
        due = self._step + 1 == self._next
        if due and self._method.early:
            self._start_due(self._step + 1)
        if share.losses:
            self._apply(lambda: self._own_gradients(share, self._check_finite), lambda: self._own_hessian(share))
        self._step += 1
        self._samples += share.samples
        self._global_samples += share.global_samples
        # Of what all ranks know alone, for it decides how they reduce.
        self._even &= share.global_samples % self.comm.size == 0
        if due:
            self._act()

    def message_bytes(self) -> list[int]:
        if self.comm.size == 1:
            return []
        return [piece.signal.buffer.nbytes for fragment in self._fragments for piece in fragment.pieces]

    @contextmanager
    def consensus(self) -> Iterator[None]:
        with restored([*self.model.parameters(), *self.model.buffers()]):
            self._reach_consensus()
            yield

    def finish(self) -> None:
        for fragment in self._fragments:
            fragment.land()
        self._reach_consensus()
        for fragment in self._fragments:
            fragment.release()
        self._begin()

    def measures(self) -> dict[str, float]:
        sums = {"squared_distance": self._squared_distance, "fragments_measured": float(self._measured)}
        self._squared_distance, self._measured = 0.0, 0
        return sums

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return the period in force, and `model_distance`: the root mean square over ranks of ‖x_i - x̄‖.

        It is that of the models sent in the first exchange since the last figures, x̄ their mean as it was formed (with
        a codec: as it came through); there is none where none has been taken over. Where the model is exchanged in
        fragments, it is put together from those that were exchanged.
        """
        figures: dict[str, Any] = {"period": self._period.at(self._step)}
        if sums["fragments_measured"] > 0:
            mean = sums["squared_distance"] / sums["fragments_measured"]
            figures["model_distance"] = math.sqrt(len(self._fragments) * mean)
        return figures

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank, once exchanges under way have landed. All ranks must call."""
        return {
            **super().state_dict(),
            # Copied, for they may lie in memory that other ranks read.
            "parameters": {name: value.detach().clone() for name, value in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "seen": [self._step, self._samples, self._global_samples, int(self._even)],
            "fragments": [fragment.state_dict() for fragment in self._fragments],
            "scaling": None if self.scaling is None else self.scaling.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state["parameters"][name])
        self._step, self._samples, self._global_samples, even = state["seen"]
        self._even = bool(even)
        for fragment, saved in zip(self._fragments, state["fragments"], strict=True):
            fragment.load_state_dict(saved)
        for average in self._averages:
            average.forget()
        if self.scaling is not None:
            self.scaling.load_state_dict(state["scaling"])
        self._plan()

    def restart(self, step: int) -> None:
        """Go on from a consensus model just loaded, after this many steps; the outer optimizer begins afresh."""
        self._step = step
        self._samples = self._global_samples = 0
        self._even = True
        for fragment in self._fragments:
            fragment.land()
            for piece in fragment.pieces:
                piece.momentum.zero_()
        self._begin()

    def _check(self, fragments: int, parameters: int) -> None:
        """Raise ConfigError where options do not fit together."""
        shortest = self._period.shortest
        every = "every step" if shortest == 1 else f"every {shortest} steps"
        every = every if self._period.longest == shortest else f"{every} at times"
        if self._delay >= shortest:
            raise ConfigError(
                f"--delay {self._delay}: {self.name} exchanges models {every}, and an exchange must have been taken "
                f"over when the next one starts; choose {f'0 to {shortest - 1}' if shortest > 1 else '0'}"
            )
        if self._delay and self._method.early:
            raise ConfigError(
                f"--delay {self._delay}: an exchange of {self.name} lasts from one step to the next anyway; choose 0"
            )
        if fragments > shortest:
            raise ConfigError(
                f"--fragments {fragments}: {self.name} exchanges the model {every}, one fragment a step; choose 1 to "
                f"{shortest}"
            )
        if fragments > parameters > 0:
            raise ConfigError(
                f"--fragments {fragments}: the model has {parameters} parameter tensors, which are not cut; choose 1 "
                f"to {parameters}"
            )
        if self._inner_state == "average" and self._needs_closure:
            raise ConfigError(
                f"--inner-state average: {type(self.optimizer).__name__} keeps a history of its steps, whose average "
                f"means nothing; choose keep or reset"
            )

    @torch.no_grad()
    def _begin(self) -> None:
        """Take the model, equal on all ranks, as the anchor."""
        period = self._period.at(self._step)
        for index, fragment in enumerate(self._fragments):
            due = self._step + period * (index + 1) // len(self._fragments)
            fragment.begin(due, (self._samples, self._global_samples))
        self._plan()

    def _plan(self) -> None:
        """Settle the next step in which there is something to do."""
        steps = []
        for fragment in self._fragments:
            if fragment.arrival is not None:
                steps.append(fragment.arrival if fragment.rounds == 1 else self._step + 1)
            steps.append(fragment.due)
        self._next = min(steps, default=None)

    @torch.no_grad()
    def _act(self) -> None:
        """Do what is to be done at the end of this step: the same on all ranks, since it depends on the step alone."""
        for index, fragment in enumerate(self._fragments):
            if fragment.arrival == self._step:
                self._take_over(index)
            elif fragment.arrival is not None:
                fragment.advance()
        self._start_due(self._step)
        for index, fragment in enumerate(self._fragments):
            if fragment.arrival == self._step:
                self._take_over(index)
        self._plan()

    @torch.no_grad()
    def _start_due(self, step: int) -> None:
        """Start the exchanges that are due at `step`."""
        for fragment in self._fragments:
            if fragment.due == step:
                fragment.due += self._period.at(step)
                blocking = self._delay == 0 and not self._method.early
                measured = self._measured < len(self._fragments)
                now = self._samples, self._global_samples
                fragment.start(step + self._delay, now, blocking, self._even, measured)
                # Read where there is one fragment and no delay, so that this is since its `base`.
                self._even = True

    def _take_over(self, index: int) -> None:
        fragment = self._fragments[index]
        fragment.land()
        # A pass over memory, which is worth it only for exchanges that are told of.
        if self._measured < len(self._fragments):
            self._squared_distance += fragment.squared_distance()
            self._measured += 1
        fragment.take_over(self._method, float(self.optimizer.param_groups[0]["lr"]))
        if self._inner_state == "average":
            self._averages[index].average_()
        elif self._inner_state == "reset":
            for parameter in fragment.parameters:
                self.optimizer.state.pop(parameter, None)
        if self._buffers != "leave" and index == len(self._fragments) - 1:
            agree_on_buffers(self.model, self.comm, self._buffers)

    @torch.no_grad()
    def _reach_consensus(self) -> None:
        """Make the model the consensus of all ranks, without a trace in what is under way."""
        if self._method.consensus_is_anchor:
            for fragment in self._fragments:
                for piece in fragment.pieces:
                    if piece.anchor is not None:
                        copy_quotient(piece.anchor, 1)
        else:
            self._average_models()
        agree_on_buffers(self.model, self.comm, self._buffers)

    def _average_models(self) -> None:
        now = self._samples, self._global_samples
        works = []
        for fragment in self._fragments:
            if fragment.base == now:
                # Nobody has made a step since the last agreement.
                continue
            factor, divisor = fragment.weight(fragment.base, now)
            for piece in fragment.pieces:
                bucket = piece.signal
                if fragment.arrival is not None:
                    bucket = Bucket(bucket.parameters, torch.empty_like(bucket.buffer), bucket.spacing)
                fill(bucket, factor)
                works.append((bucket, divisor, self.comm.all_reduce(bucket.buffer)))
        for bucket, divisor, work in works:
            work.wait()
            copy_quotient(bucket, divisor)
