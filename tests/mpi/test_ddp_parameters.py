"""Kinds of parameters and what users do with them between steps."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import CommunicationError
from allreduce_sgd.topology import Topology
from tests.mpi.replicas import Replicas, assert_same_gradients, assert_same_parameters, gradient_of, network, samples


def loss_of(model: nn.Module, rank: int, step: int = 0) -> Tensor:
    inputs, classes = samples(rank, step=step)
    return functional.cross_entropy(model(inputs), classes)


def wrapped(module: nn.Module, comm: Communicator, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module, comm, bucket_mb=1e-4, first_bucket_mb=1e-4, **options)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_in_both_forms(comm: Communicator, set_to_none: bool) -> None:
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    for step in range(4):
        ddp.zero_grad(set_to_none=set_to_none)
        replicas.zero_grad(set_to_none)
        loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])


def test_gradients_replaced_by_the_user_between_steps(comm: Communicator) -> None:
    """`.grad` may be set to another tensor or scaled: the next pass adds to what is there."""
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)
    for step in range(4):
        loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        with torch.no_grad():
            for model in [ddp.module, *replicas.models]:
                first, second, *_ = model.parameters()
                first.grad = torch.full_like(first, 0.5)
                gradient_of(second).mul_(3)


def frozen_but_last() -> nn.Sequential:
    model = network()
    model[0].requires_grad_(False)
    return model


def test_parameters_frozen_and_unfrozen_later(comm: Communicator) -> None:
    ddp, replicas = wrapped(frozen_but_last(), comm), Replicas(frozen_but_last, comm.size)
    trained = [True, False, True, True, False]
    for step, first_trained in enumerate(trained):
        for model in [ddp.module, *replicas.models]:
            model.get_submodule("0").requires_grad_(first_trained)
        # Hooks cannot be put on a frozen parameter: the copies count all of theirs as used here.
        for model, used in zip(replicas.models, replicas.used, strict=True):
            used.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        loss_of(ddp, comm.rank, step).backward()
        replicas.backward(loss_of, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        assert (ddp.module.get_parameter("0.weight").grad is None) == (not first_trained)
        ddp.zero_grad()
        replicas.zero_grad()


def test_a_parameter_frozen_on_one_rank_only_stops_all_ranks(topology: Topology) -> None:
    if topology.size == 1:
        pytest.skip("needs a second rank")
    options = CommunicationOptions("mpi", timeout_seconds=2)
    comm = connect(topology, torch.device("cpu"), options)
    ddp = wrapped(network(), comm)
    loss_of(ddp, comm.rank).backward()
    if comm.rank == comm.size - 1:
        ddp.module.get_parameter("2.weight").requires_grad_(False)
    with pytest.raises(CommunicationError):
        loss_of(ddp, comm.rank).backward()


def test_everything_frozen_for_a_while(comm: Communicator) -> None:
    """As in a generative adversarial network, where gradients pass through a frozen discriminator."""
    ddp, replicas = wrapped(network(), comm), Replicas(network, comm.size)

    def loss(model: nn.Module, rank: int, step: int) -> Tensor:
        return model(samples(rank, step=step)[0]).square().mean()

    for step in range(4):
        frozen = step % 2 == 1
        ddp.module.requires_grad_(not frozen)
        inputs = samples(comm.rank, step=step)[0].requires_grad_()
        ddp(inputs).square().mean().backward()
        assert gradient_of(inputs).any()
        if frozen:
            assert all(parameter.grad is None for parameter in ddp.parameters())
        else:
            replicas.backward(loss, step)
            assert_same_gradients(ddp.module, replicas.models[comm.rank])
        ddp.zero_grad()
        replicas.zero_grad()


def test_a_param_group_added_later(comm: Communicator) -> None:
    """Fine-tuning: the head alone at first, then the body joins the optimizer with a learning rate of its own."""

    def start(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.get_submodule("2").parameters(), lr=0.5, momentum=0.9)

    def unfreeze(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.get_submodule("0").requires_grad_(True)
        optimizer.add_param_group({"params": list(model.get_submodule("0").parameters()), "lr": 0.1})

    ddp, serial = wrapped(frozen_but_last(), comm), frozen_but_last()
    optimizers = [start(ddp.module), start(serial)]
    for step in range(6):
        if step == 3:
            unfreeze(ddp.module, optimizers[0])
            unfreeze(serial, optimizers[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(ddp, comm.rank, step).backward()
        parts = [samples(rank, step=step) for rank in range(comm.size)]
        inputs, classes = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        functional.cross_entropy(serial(inputs), classes).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_same_parameters(ddp.module, serial)


def test_a_closure_that_is_called_several_times_a_step(comm: Communicator) -> None:
    """L-BFGS, told not to stop early, which it would decide by the loss of each rank."""
    ddp, serial = wrapped(network(), comm), network()
    parts = [samples(rank) for rank in range(comm.size)]
    everything = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    optimizers = [
        torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, tolerance_grad=0, tolerance_change=0)
        for model in (ddp, serial)
    ]
    calls = [0, 0]

    def closure(which: int, model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
        calls[which] += 1
        optimizers[which].zero_grad()
        loss = functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return float(loss.detach())

    for _ in range(3):
        optimizers[0].step(partial(closure, 0, ddp, parts[comm.rank]))
        optimizers[1].step(partial(closure, 1, serial, everything))
        assert_same_parameters(ddp.module, serial)
    assert calls[0] == calls[1] > 3


class Mixed(nn.Module):
    """Every dtype and layout that can be trained, an empty parameter, a scalar, a frozen one and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(4, 4, bias=False)
        self.image = nn.Conv2d(2, 3, 3)
        self.image.weight = nn.Parameter(self.image.weight.detach().to(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.gaps = nn.Parameter(torch.randn(4, 6)[:, ::2])
        self.brief = nn.Parameter(torch.randn(5).bfloat16())
        self.short = nn.Parameter(torch.randn(7).half())
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.wide_phase = nn.Parameter(torch.randn(2, 2, dtype=torch.complex128))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, scale: float) -> Tensor:
        image = torch.arange(50.0).view(1, 2, 5, 5).to(memory_format=torch.channels_last)
        twice = self.shared(self.shared(torch.ones(1, 4)))
        phases = [torch.view_as_real(phase).float().square() for phase in (self.phase, self.wide_phase)]
        wide = [self.brief.float(), self.short.float() ** 2, self.wide.float() ** 2, self.transposed**2, self.gaps**3]
        parts = [*phases, *wide, self.image(image), twice, self.empty]
        return scale * self.scalar * torch.stack([part.sum() for part in parts]).sum() + self.frozen.sum()


@pytest.mark.parametrize("bucket_mb", [1e-6, 1e-4, 25.0])
def test_every_dtype_and_layout_at_once(comm: Communicator, bucket_mb: float) -> None:
    ddp = DistributedDataParallel(Mixed(), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb)
    replicas = Replicas(Mixed, comm.size)
    for step in range(3):
        ddp(float(comm.rank + step + 1)).backward()
        replicas.backward(lambda model, rank, step: model(float(rank + step + 1)), step)
        for name, wanted in replicas.models[comm.rank].named_parameters():
            parameter = ddp.module.get_parameter(name)
            if wanted.grad is None:
                assert parameter.grad is None
                continue
            coarse = {torch.bfloat16: 0.02, torch.float16: 0.003}.get(parameter.dtype, 1e-5)
            torch.testing.assert_close(parameter.grad, wanted.grad, rtol=coarse, atol=coarse)
        ddp.zero_grad()
        replicas.zero_grad()


def test_a_gradient_has_the_layout_of_its_parameter(comm: Communicator) -> None:
    """Optimizers' fused and foreach forms are fast only where both have the same strides."""
    ddp = wrapped(Mixed(), comm)
    for _ in range(2):
        ddp(1.0).backward()
        for name in ("image.weight", "transposed", "shared.weight"):
            parameter = ddp.module.get_parameter(name)
            assert gradient_of(parameter).stride() == parameter.stride(), name
        ddp.zero_grad()


def test_a_copy_of_the_wrapper_trains_on_its_own(comm: Communicator) -> None:
    ddp = wrapped(network(), comm)
    loss_of(ddp, comm.rank).backward()
    before = [gradient_of(parameter).clone() for parameter in ddp.parameters()]
    twin = copy.deepcopy(ddp)
    assert all(mine is not theirs for mine, theirs in zip(ddp.parameters(), twin.parameters(), strict=True))
    twin.zero_grad()
    replicas = Replicas(network, comm.size)
    for step in range(1, 4):
        loss_of(twin, comm.rank, step).backward()
        replicas.backward(loss_of, step)
        assert_same_gradients(twin.module, replicas.models[comm.rank])
    # What the twin did is no concern of the first.
    for parameter, wanted in zip(ddp.parameters(), before, strict=True):
        assert torch.equal(gradient_of(parameter), wanted)
    loss_of(ddp, comm.rank).backward()
    for parameter, wanted in zip(ddp.parameters(), before, strict=True):
        torch.testing.assert_close(gradient_of(parameter), 2 * wanted)


def test_a_pickled_wrapper_is_attached_and_goes_on(comm: Communicator) -> None:
    ddp = wrapped(network(), comm)
    loss_of(ddp, comm.rank).backward()
    torch.optim.SGD(ddp.parameters(), lr=0.1).step()
    back = pickle.loads(pickle.dumps(ddp))
    assert_same_parameters(back.module, ddp.module)
    inputs, _ = samples(comm.rank)
    torch.testing.assert_close(back.eval()(inputs), ddp.eval()(inputs))
    back.train()
    back.attach(comm)
    ddp.train()
    for model in (back, ddp):
        model.zero_grad()
        loss_of(model, comm.rank, 1).backward()
    assert_same_gradients(back.module, ddp.module)
    assert torch.isfinite(gradient_of(next(back.parameters()))).all()


def test_state_dict_goes_to_and_comes_from_torchs_wrapper(comm: Communicator, gloo: Any) -> None:
    def make(seed: int) -> nn.Module:
        return nn.Sequential(network(seed), nn.BatchNorm1d(3).double())

    ours = wrapped(make(1), comm)
    theirs = nn.parallel.DistributedDataParallel(make(2), process_group=gloo)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert_same_parameters(theirs.module, make(1))
    ours.load_state_dict(make_prefixed(make(3)))
    assert_same_parameters(ours.module, make(3))
    ours.module.load_state_dict(make(4).state_dict())
    assert_same_parameters(ours.module, make(4))


def make_prefixed(module: nn.Module) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in module.state_dict().items()}


class Scaled(nn.Module):
    """loss = sum of scale times parameter, so that the gradient is the scale, in the parameter's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(500, dtype=dtype))

    def forward(self, scale: Tensor) -> Tensor:
        return (self.weight * scale).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_summed_in_single_precision_is_rounded_once(comm: Communicator, dtype: torch.dtype) -> None:
    """Summed in its own dtype, each of the 500 elements would be rounded `size` times."""
    ddp = wrapped(Scaled(dtype), comm, reduce_dtype=torch.float32)
    for step in range(3):
        scales = (1 + torch.rand(comm.size, 500, generator=torch.Generator().manual_seed(step))).to(dtype)
        ddp.zero_grad()
        ddp(scales[comm.rank]).backward()
        gradient = gradient_of(ddp.module.get_parameter("weight"))
        assert gradient.dtype is dtype
        mean = scales.double().mean(dim=0)
        assert ((gradient.double() - mean).abs() / mean).max() <= 0.501 * torch.finfo(dtype).eps


def test_dtypes_that_are_wide_enough_are_summed_as_they_are(comm: Communicator) -> None:
    ddp = wrapped(Scaled(torch.float64), comm, reduce_dtype=torch.float32)
    scales = torch.rand(comm.size, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ddp(scales[comm.rank]).backward()
    gradient = gradient_of(ddp.module.get_parameter("weight"))
    torch.testing.assert_close(gradient, scales.mean(dim=0), rtol=1e-14, atol=0)


def test_half_precision_accumulated_before_it_is_summed(comm: Communicator) -> None:
    """Accumulated by autograd in its own dtype, as the bare module does."""
    ddp, bare = wrapped(Scaled(torch.bfloat16), comm, reduce_dtype=torch.float32), Scaled(torch.bfloat16)
    scales = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    with ddp.no_sync():
        ddp(scales[0]).backward()
    ddp(scales[1]).backward()
    for scale in scales:
        bare(scale).backward()
    torch.testing.assert_close(gradient_of(ddp.module.get_parameter("weight")), gradient_of(bare.weight))
