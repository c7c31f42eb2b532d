"""Hogwild!: the ranks of a node update one copy of the parameters in shared memory, without locks.

Niu, Recht, Re and Wright, "Hogwild!: A lock-free approach to parallelizing stochastic gradient descent", NIPS 2011,
arXiv 1106.5730. No signal and no exchange: each rank reads the parameters while others write them, computes the
gradient of its mini-batch, and takes the optimizer's step in place; of sparse gradients only the touched rows are
written. Where samples share few features, ranks seldom write the same one, and it converges nearly as serial SGD does.
The step is the paper's: every update uses the whole learning rate.

Bytes per rank and step: none are sent. The ranks' caches fetch what others wrote, which is not counted.

Differences from the paper: the unit is a mini-batch, not one sample. The paper adds to each element atomically; here an
addition is a load and a store, so where two ranks change one element at once, one of the changes can be lost. Any
optimizer that works element by element will do; its state (momentum, sums of squares) is each rank's own, made of its
own gradients. The paper's workers draw samples independently; here ranks take tickets (`pace.py`) from a counter in
shared memory, so that an epoch visits every sample once. The counter has a lock, held for a few microseconds.

The staleness of an update is the number of updates that others ended between its reading and its writing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.shared_numbers import SharedNumbers
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.buckets import SPACING, Bucket, Kind, kind_of, spaced
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import broadcast_tensors, check_same_model
from allreduce_sgd.gradients.sharded import is_elementwise
from allreduce_sgd.gradients.sparse import has_sparse_gradients
from allreduce_sgd.optim.build import check_takes_sparse, name_of
from allreduce_sgd.strategies.base import Share, Strategy, agree_on_buffers, restored
from allreduce_sgd.strategies.pace import REPORTED, Pace, Ticket
from allreduce_sgd.strategies.precision import LossScaling

__all__ = ["Hogwild", "HogwildPace", "check_hogwild_optimizer"]

CPU = torch.device("cpu")
# What the numbers of a pace are: how many tickets have been taken, how many there are, then the sums of the reports.
_TAKEN, _THERE_ARE, _SUMS = 0, 1, 2
_ASKS_TO_STOP = _SUMS + REPORTED - 1
# A cache line for each rank's count of updates, so that counting does not slow down the others.
_COUNT_STRIDE = 8


class HogwildPace(Pace):
    """Tickets from a counter in memory that the ranks of `comm` share. All ranks must make it together.

    Raises MemoryNotSharedError where they share none.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._first = 0
        self._shared = SharedNumbers(comm, _SUMS + REPORTED)

    def open(self, first: int, until: int) -> None:
        self._first = first
        # Of the stretch before, the others may still have to read how it ended.
        self._comm.barrier().wait()
        if self._comm.rank == 0:
            with self._shared as numbers:
                numbers[_TAKEN] = 0
                numbers[_THERE_ARE] = (until - first) * self._comm.size
                for place in range(_SUMS, _SUMS + REPORTED):
                    numbers[place] = 0
        self._comm.barrier().wait()

    def take(self, report: Sequence[float]) -> Ticket | None:
        parts = self._comm.size
        with self._shared as numbers:
            for place, value in enumerate(report, _SUMS):
                numbers[place] += value
            ticket = int(numbers[_TAKEN])
            if numbers[_ASKS_TO_STOP]:
                # To the end of the step that was begun.
                numbers[_THERE_ARE] = min(numbers[_THERE_ARE], -(-ticket // parts) * parts)
            given = ticket < numbers[_THERE_ARE]
            if given:
                numbers[_TAKEN] = ticket + 1
            self.totals = numbers[_SUMS:].tolist()
        return Ticket(self._first + ticket // parts, ticket % parts) if given else None

    def close(self) -> int:
        self._comm.barrier().wait()
        with self._shared as numbers:
            self.totals = numbers[_SUMS:].tolist()
            return self._first + int(numbers[_THERE_ARE]) // self._comm.size


class Hogwild(Strategy):
    """Moves the model's parameters into memory that all ranks share, and steps there; buffers stay each rank's own.

    Of `gradients` it takes whether every rank checks its own gradients for NaN and infinity, and what becomes of
    buffers in the consensus model. One rank alone is serial SGD, bit for bit, on any device.

    Raises ConfigError where the ranks do not share memory, or the optimizer does not suit.
    """

    name = "hogwild"
    consensus_kind = "the shared parameters"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        comm: Communicator,
        clip_norm: float | None,
        gradients: GradientOptions,
        scaling: LossScaling | None = None,
    ) -> None:
        super().__init__(model, optimizer, comm, clip_norm, scaling)
        check_hogwild_optimizer(optimizer, has_sparse_gradients(model))
        self._check_finite = gradients.check_finite
        self._buffers = gradients.buffers
        if comm.size > 1:
            check_same_model(model, comm)
            broadcast_tensors(model.buffers(), comm)
            _move_into_shared_memory(model, comm)
        counts = _shared(comm, comm.size * _COUNT_STRIDE, (torch.int64, CPU))
        self._counts = memoryview(counts.numpy())[::_COUNT_STRIDE]  # type: ignore[arg-type]  # arrays are buffers
        self.pace = HogwildPace(comm)
        self._updates = 0
        self._others_at_reading = 0
        self._staleness: Counter[int] = Counter()
        self._measured = {"updates": 0.0, "staleness": 0.0}

    @property
    def in_agreement(self) -> bool:
        # One memory is one model, but others may be writing it while it is looked at.
        return False

    def step(self, share: Share) -> None:
        if share.losses:
            self._others_at_reading = self._updates_of_others()
            self._apply(lambda: self._own_gradients(share, self._check_finite))

    @contextmanager
    def consensus(self) -> Iterator[None]:
        self.comm.barrier().wait()
        with restored(self.model.buffers()):
            agree_on_buffers(self.model, self.comm, self._buffers)
            yield
        self.comm.barrier().wait()

    def finish(self) -> None:
        self.comm.barrier().wait()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()
        agree_on_buffers(self.model, self.comm, self._buffers)

    def measures(self) -> dict[str, float]:
        measured, self._measured = self._measured, {"updates": 0.0, "staleness": 0.0}
        return measured

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        return {"mean_staleness": sums["staleness"] / sums["updates"]} if sums.get("updates") else {}

    def summary(self) -> dict[str, Any]:
        total: Counter[int] = Counter()
        for histogram in all_gather_object(self.comm, list(self._staleness.items())):
            total.update(dict(histogram))
        updates = total.total()
        return {
            "mean_staleness": sum(late * count for late, count in total.items()) / updates if updates else None,
            "staleness": {str(late): total[late] for late in sorted(total)},
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaling": None if self.scaling is None else self.scaling.state_dict(),
            "staleness": dict(self._staleness),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaling is not None:
            self.scaling.load_state_dict(state["scaling"])
        self._staleness = Counter(state["staleness"])
        self._meet_loaded()

    def restart(self, step: int) -> None:
        self._meet_loaded()

    def _meet_loaded(self) -> None:
        # All ranks load the one model: nobody may train before the last has done so.
        self.comm.barrier().wait()

    def _update(self) -> None:
        staleness = self._updates_of_others() - self._others_at_reading
        skipped = 0 if self.scaling is None else self.scaling.skipped_steps
        super()._update()
        if self.scaling is not None and self.scaling.skipped_steps > skipped:
            return
        self._updates += 1
        self._counts[self.comm.rank] = self._updates
        self._staleness[staleness] += 1
        self._measured["updates"] += 1
        self._measured["staleness"] += staleness

    def _updates_of_others(self) -> int:
        return sum(self._counts) - self._updates


def check_hogwild_optimizer(optimizer: torch.optim.Optimizer, sparse: bool) -> None:
    """Raise ConfigError unless ranks can take this optimizer's steps in one memory; `sparse`: with sparse gradients."""
    kind = type(optimizer)
    name = name_of(optimizer)
    if not is_elementwise(optimizer) and kind is not torch.optim.SparseAdam:
        raise ConfigError(
            f"--optimizer {name}: strategy hogwild needs one that updates each element by itself, such as sgd, adagrad "
            f"or adam"
        )
    if not sparse:
        return
    check_takes_sparse(optimizer)
    for group in optimizer.param_groups:
        if group.get("momentum"):
            raise ConfigError(
                f"--momentum {group['momentum']:g}: strategy hogwild writes only the rows that sparse gradients touch, "
                f"and momentum moves all; allowed is 0"
            )


def _move_into_shared_memory(model: nn.Module, comm: Communicator) -> None:
    """Have the parameters of all ranks be rank 0's, in one memory. All ranks must call."""
    kinds: dict[Kind, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kinds.setdefault(kind_of(parameter), []).append(parameter)
    for kind, parameters in kinds.items():
        # Spaced, so that kernels round each parameter's elements as they do in memory of its own.
        flat = _shared(comm, sum(spaced(parameter.numel(), SPACING) for parameter in parameters), kind)
        for parameter, slot in zip(parameters, Bucket(parameters, flat, SPACING).slots, strict=True):
            if comm.rank == 0:
                slot.copy_(parameter.data)
            parameter.data = slot
    comm.barrier().wait()


def _shared(comm: Communicator, numel: int, kind: Kind) -> Tensor:
    if comm.size == 1:
        return torch.zeros(numel, dtype=kind[0], device=kind[1])
    memory = comm.allocate_shared(numel, *kind)
    if memory is None:
        raise ConfigError(
            f"--strategy hogwild: needs all ranks on one node, with --backend mpi and --device cpu, to share the "
            f"parameters; here --backend {comm.backend} on {kind[1].type} gives {comm.size} ranks no memory in common"
        )
    return memory
