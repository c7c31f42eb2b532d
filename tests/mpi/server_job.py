"""A job with parameter servers for tests: some ranks serve, and the others run what the test wants."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.pace import REPORTED
from allreduce_sgd.strategies.server.build import build_server, build_worker
from allreduce_sgd.strategies.server.loop import Server
from allreduce_sgd.strategies.server.roles import divide
from allreduce_sgd.strategies.server.worker import Served
from tests.mpi.test_strategies import mini_batch, network, part_of

Work = Callable[[Served], Any]
State = dict[str, Any]

MOMENTUM = OptimizerOptions(lr=0.1, momentum=0.9)
PLAIN = OptimizerOptions(lr=0.1, momentum=0.0)


class Job:
    """Built on all ranks of `comm` alike. `saved` holds a server's states by step."""

    def __init__(
        self,
        comm: Communicator,
        options: StrategyOptions,
        optimizer: OptimizerOptions,
        model: nn.Module,
        gradients: GradientOptions | None = None,
        **more: Any,
    ) -> None:
        given = gradients or GradientOptions()
        self.role = divide(comm, options)
        self.saved: dict[int, State] = {}
        self.sent_bytes: dict[int, int] = {}
        self.server: Server | None = None
        self.worker: Served | None = None
        if self.role.serves:
            more.pop("precision", None)
            self.server = build_server(options, given, optimizer, model, self.role, **more)
        else:
            self.worker = build_worker(options, given, optimizer, model, self.role, **more)

    def run(self, work: Work) -> Any:
        """Return what `work` returns, and None on servers. Workers finish afterwards."""
        outcome = None
        if self.worker is not None:
            outcome = work(self.worker)
            self.worker.finish()
        if self.server is not None:
            self.server.serve(self._save)
        self.role.peers.close()
        return outcome

    def _save(self, step: int) -> None:
        assert self.server is not None
        self.saved[step] = copy.deepcopy(self.server.state_dict())
        self.sent_bytes[step] = self.role.world.traffic.bytes_sent or 0


def state_of(worker: Served) -> State:
    """What the trainer would save of a worker, copied: its own, its optimizer's, and the consensus."""
    with worker.consensus():
        model = copy.deepcopy(worker.model.state_dict())
    return {"own": copy.deepcopy(worker.state_dict()), "model": model, "optimizer": worker.optimizer.state_dict()}


def resume(worker: Served, state: Mapping[str, Any]) -> None:
    worker.model.load_state_dict(state["model"])
    worker.optimizer.load_state_dict(state["optimizer"])
    worker.load_state_dict(state["own"])


def in_step(worker: Served, first: int, until: int, count: int) -> None:
    """Train in lockstep on the mini-batches of the serial tests."""
    for step in range(first, until):
        worker.step(part_of(mini_batch(step, count), worker.comm.rank, worker.comm.size))


def at_own_pace(worker: Served, first: int, until: int, count: int) -> int:
    """Take tickets for the same mini-batches; return the step that training stands at."""
    assert worker.pace is not None
    worker.pace.open(first, until)
    report = [0.0] * REPORTED
    while (ticket := worker.pace.take(report)) is not None:
        share = part_of(mini_batch(ticket.step, count), ticket.part, worker.comm.size)
        worker.step(share)
        report = [0.0, float(share.samples), 0.0, 0.0, 0.0]
    return worker.pace.close()


def sync(servers: int = 1) -> StrategyOptions:
    return StrategyOptions(strategy="server-sync", servers=servers)


def needs(comm: Communicator, ranks: int) -> None:
    if comm.size < ranks:
        pytest.skip(f"needs {ranks} ranks")


def train(options: StrategyOptions, comm: Communicator, optimizer: OptimizerOptions, steps: int, count: int) -> Any:
    """Return the model after so many steps, None on servers."""

    def work(worker: Served) -> nn.Module:
        if worker.pace is None:
            in_step(worker, 0, steps, count)
        else:
            assert at_own_pace(worker, 0, steps, count) == steps
        return worker.model

    return Job(comm, options, optimizer, network()).run(work)


def with_batch_norm() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
