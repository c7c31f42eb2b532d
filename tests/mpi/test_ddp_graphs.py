"""Graphs that are not one chain: control flow by rank, shared parameters, checkpointing, exceptions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from tests.mpi.replicas import Loss, Replicas, assert_same_gradients, network, samples


def compare(
    comm: Communicator, make: Callable[[], nn.Module], run: Loss, steps: int = 4, plan: str = "", **options: Any
) -> DistributedDataParallel:
    """Run `run(model, rank, step)` for some steps, and assert that every gradient is that of the replicas.

    `plan` has a letter per step: "s" synchronised, "n" under no_sync; None of them: all are synchronised. Gradients
    are cleared after each synchronised step.
    """
    ddp = DistributedDataParallel(make(), comm, bucket_mb=1e-6, first_bucket_mb=1e-6, **options)
    replicas = Replicas(make, comm.size)
    for step, letter in enumerate(plan or "s" * steps):
        if letter == "n":
            with ddp.no_sync():
                run(ddp, comm.rank, step).backward()
        else:
            run(ddp, comm.rank, step).backward()
        replicas.backward(run, step, letter == "s")
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        if letter == "s":
            ddp.zero_grad()
            replicas.zero_grad()
    return ddp


def batch(rank: int, step: int) -> Tensor:
    return samples(rank, step=step)[0]


def mean_square(model: nn.Module, rank: int, step: int) -> Tensor:
    return model(batch(rank, step)).square().mean()


class Tied(nn.Module):
    """One weight under two names, and one layer that is applied several times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.middle, self.decoder = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.double()
        self.mirror = nn.Linear(5, 6, bias=False)
        self.mirror.weight = self.encoder.weight

    def forward(self, inputs: Tensor, times: int = 1) -> Tensor:
        hidden = torch.tanh(self.encoder(inputs))
        for _ in range(times):
            hidden = torch.tanh(self.middle(hidden))
        return (self.decoder(hidden) + self.mirror(inputs).sum(dim=1, keepdim=True)).square().mean()


@pytest.mark.parametrize("static_graph", [False, True])
def test_shared_parameters(comm: Communicator, static_graph: bool) -> None:
    ddp = compare(comm, Tied, lambda model, rank, step: model(batch(rank, step)), static_graph=static_graph)
    assert ddp.module.get_parameter("mirror.weight") is ddp.module.get_parameter("encoder.weight")


def test_loops_of_different_length_on_every_rank(comm: Communicator) -> None:
    compare(comm, Tied, lambda model, rank, step: model(batch(rank, step), times=(rank + step) % 3))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(3)).double()

    def forward(self, inputs: Tensor, order: list[int]) -> Tensor:
        """Use the heads in `order`: autograd reaches the last one first."""
        return sum((index + 1) * self.heads[index](inputs).square().mean() for index in order)


def test_gradients_that_arrive_in_another_order_on_every_rank(comm: Communicator) -> None:
    orders = [[0, 1, 2], [2, 1, 0], [1, 0, 2], [2, 0, 1]]
    compare(comm, Heads, lambda model, rank, step: model(batch(rank, step), orders[(rank + step) % 4]), steps=6)


class Checkpointed(nn.Module):
    """Layers recomputed in the backward pass, one of them twice."""

    def __init__(self, use_reentrant: bool, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use_reentrant, self.shared = use_reentrant, shared
        self.first, self.block, self.last = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 1)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(2 if self.shared else 1):
            hidden = checkpoint(self.block, hidden, use_reentrant=self.use_reentrant)
        return self.last(hidden).square().mean()


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(comm: Communicator, use_reentrant: bool, shared: bool, static_graph: bool) -> None:
    def run(model: nn.Module, rank: int, step: int) -> Tensor:
        return model(batch(rank, step))

    compare(comm, partial(Checkpointed, use_reentrant, shared), run, plan="ssnssns", static_graph=static_graph)


def test_several_forward_passes_before_one_backward(comm: Communicator) -> None:
    def run(model: nn.Module, rank: int, step: int) -> Tensor:
        losses = [model(batch(rank, 10 * step + part)).square().mean() for part in range(3)]
        return losses[0] + 2 * losses[1] - losses[2]

    compare(comm, network, run)


def test_several_backward_passes_through_one_graph(comm: Communicator) -> None:
    ddp = DistributedDataParallel(network(), comm, bucket_mb=1e-6)
    replicas = Replicas(network, comm.size)
    for _ in range(2):
        loss = ddp(batch(comm.rank, 0)).square().mean()
        parts = [model(batch(rank, 0)).square().mean() for rank, model in enumerate(replicas.models)]
        for _ in range(2):
            loss.backward(retain_graph=True)
            for part in parts:
                part.backward(retain_graph=True)
            replicas.average()
            assert_same_gradients(ddp.module, replicas.models[comm.rank])


def test_a_penalty_on_the_gradient_of_the_inputs(comm: Communicator) -> None:
    """Derivatives taken with torch.autograd.grad are no business of the wrapper; what they add to the loss is."""

    def run(model: nn.Module, rank: int, step: int) -> Tensor:
        inputs = batch(rank, step).requires_grad_()
        outputs = model(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        return outputs.square().mean() + slope.square().sum()

    compare(comm, network, run)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_double_backward_is_refused_clearly_and_leaves_nothing_behind(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone behaves as the bare module")
    ddp = DistributedDataParallel(network(), comm, bucket_mb=1e-6)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        ddp(batch(comm.rank, 0)).square().mean().backward(create_graph=True)
    ddp.zero_grad()
    replicas = Replicas(network, comm.size)
    mean_square(ddp, comm.rank, 1).backward()
    replicas.backward(mean_square, 1)
    assert_same_gradients(ddp.module, replicas.models[comm.rank])


def test_an_evaluation_on_one_rank_alone_waits_for_nobody(comm: Communicator) -> None:
    def make() -> nn.Module:
        return nn.Sequential(network()[0], nn.BatchNorm1d(7).double(), nn.Linear(7, 1).double())

    ddp = DistributedDataParallel(make(), comm)
    if comm.rank == 0:
        ddp.eval()
        with torch.no_grad():
            ddp(batch(0, 0))
        ddp.train()
    ddp(batch(comm.rank, 0)).sum().backward()


PLANS = ["sss", "snsns", "nnsns", "nsss"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("static_graph", [False, True])
def test_accumulation_in_every_place(comm: Communicator, plan: str, static_graph: bool) -> None:
    compare(comm, network, mean_square, plan=plan, static_graph=static_graph)


@pytest.mark.parametrize("plan", PLANS)
def test_static_graph_with_parameters_that_are_never_used(comm: Communicator, plan: str) -> None:
    def run(model: nn.Module, rank: int, step: int) -> Tensor:
        return model(batch(rank, step), [0, 2])

    ddp = compare(comm, Heads, run, plan=plan, static_graph=True)
    assert ddp.module.get_parameter("heads.1.weight").grad is None


@pytest.mark.parametrize("plan", PLANS)
def test_static_graph_that_differs_between_ranks(comm: Communicator, plan: str) -> None:
    """Every rank uses the same parameters in each pass, but each other ones."""

    def run(model: nn.Module, rank: int, step: int) -> Tensor:
        return model(batch(rank, step), [0, 1] if rank == 0 else [2, 0])

    compare(comm, Heads, run, plan=plan, static_graph=True)


class Boxed:
    """An output in which nobody can find the tensors."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Outputs(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.body, self.left, self.right = nn.Linear(5, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.double()

    def forward(self, inputs: Tensor) -> Any:
        hidden = checkpoint(self.body, inputs, use_reentrant=False)
        left, right = self.left(hidden), self.right(hidden)
        match self.form:
            case "dict":
                return {"left": left, "rest": {"right": right}}
            case "tuple":
                return left, [right, None, 3]
            case _:
                return Boxed(left), Boxed(right)


@pytest.mark.parametrize("form", ["dict", "tuple", "boxed"])
def test_outputs_of_any_form_of_which_one_is_used(comm: Communicator, form: str) -> None:
    def run(model: nn.Module, rank: int, step: int) -> Tensor:
        outputs = model(batch(rank, step))
        match form:
            case "dict":
                left, right = outputs["left"], outputs["rest"]["right"]
            case "tuple":
                left, right = outputs[0], outputs[1][0]
            case _:
                left, right = outputs[0].value, outputs[1].value
        return [left.sum(), right.square().sum(), (left * right).sum()][(rank + step) % 3]

    compare(comm, partial(Outputs, form), run)


class Stop(Exception):
    pass


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("at_step", [0, 1, 2])
def test_going_on_after_an_exception_in_a_backward_pass(
    comm: Communicator, at_step: int, layer: int, static_graph: bool
) -> None:
    """The exception is raised on all ranks, before or after some buckets have been launched."""
    ddp = DistributedDataParallel(network(), comm, bucket_mb=1e-6, first_bucket_mb=1e-6, static_graph=static_graph)
    replicas = Replicas(network, comm.size)
    weight = ddp.module[layer].weight  # type: ignore[index]

    def fail(gradient: Tensor) -> None:
        raise Stop

    for step in range(4):
        if step == at_step:
            handle = weight.register_hook(fail)
            with pytest.raises(Stop):
                ddp(batch(comm.rank, 7)).square().mean().backward()
            handle.remove()
            ddp.zero_grad()
        mean_square(ddp, comm.rank, step).backward()
        replicas.backward(mean_square, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        ddp.zero_grad()
        replicas.zero_grad()
