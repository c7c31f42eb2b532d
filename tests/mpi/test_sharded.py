"""ShardedOptimizer: the same bits as the optimizer it shards. Its state is tested in test_sharded_state.py."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.errors import NonFiniteError
from allreduce_sgd.gradients.sharded import Groups, ShardedOptimizer
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import connected
from tests.mpi.replicas import Replicas, assert_same_parameters
from tests.mpi.sharding import (
    ELEMENTWISE,
    WHOLE,
    Model,
    assert_same_bits,
    loss_of,
    one_group,
    several_groups,
    train,
    wrapped,
)


@pytest.fixture(scope="module")
def comm(topology: Topology) -> Iterator[Communicator]:
    """One that adds in the order of a reduce-scatter, whatever messages were measured to cost on this machine."""
    made = connected(topology, "mpi", "shared-memory")
    yield made
    made.close()


@pytest.mark.parametrize(("groups_of", "bucket_mb"), [(one_group, 25.0), (several_groups, 2e-4)])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_bits_of_the_unsharded_optimizer(
    comm: Communicator, name: str, groups_of: Callable[[nn.Module], Groups], bucket_mb: float
) -> None:
    make = ELEMENTWISE[name]
    plain, sharded = wrapped(comm, bucket_mb), wrapped(comm, bucket_mb)
    optimizer = ShardedOptimizer(sharded, make, groups_of(sharded.module))
    train(plain, make(groups_of(plain.module)), comm.rank, range(4))
    train(sharded, optimizer, comm.rank, range(4))
    assert_same_bits(sharded.module, plain.module)
    assert not torch.equal(sharded.module.get_parameter("scale"), Model().scale)
    assert torch.equal(sharded.module.get_parameter("idle"), Model().idle)


@pytest.mark.parametrize("share_parameters", [False, True])
def test_the_model_is_that_of_the_replicas(comm: Communicator, share_parameters: bool) -> None:
    make = ELEMENTWISE["adamw"]
    ddp, replicas = wrapped(comm), Replicas(Model, comm.size)
    optimizer = ShardedOptimizer(ddp, make, share_parameters=share_parameters)
    optimizers = [make(one_group(model)) for model in replicas.models]
    for step in range(6):
        replicas.zero_grad()
        replicas.backward(loss_of, step)
        for each in optimizers:
            each.step()
    train(ddp, optimizer, comm.rank, range(6))
    assert_same_parameters(ddp.module, replicas.models[0])


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_shared_parameters_give_the_same_bits(comm: Communicator, name: str) -> None:
    make = ELEMENTWISE[name]
    plain, sharded = wrapped(comm), wrapped(comm)
    optimizer = ShardedOptimizer(sharded, make, share_parameters=True)
    train(plain, make(one_group(plain.module)), comm.rank, range(5))
    train(sharded, optimizer, comm.rank, range(5))
    assert_same_bits(sharded.module, plain.module)
    assert optimizer.shares_parameters == (comm.size > 1)


def test_sharding_takes_no_second_memory_for_gradients(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    allocate = comm.allocate

    def counting(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        asked.append(numel)
        return allocate(numel, dtype, device)

    monkeypatch.setattr(comm, "allocate", counting)
    sharded = wrapped(comm)
    before = list(asked)
    optimizer = ShardedOptimizer(sharded, ELEMENTWISE["adam"], share_parameters=True)
    train(sharded, optimizer, comm.rank, range(3))
    # What is new are the flags, which no longer ride in a bucket: one per parameter, on a cache line.
    flags = len(list(sharded.module.parameters())) + 16
    assert all(numel <= flags for numel in asked[len(before) :])
    assert (sum(before) > 0) == (comm.size > 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(comm: Communicator, dtype: torch.dtype) -> None:
    make = ELEMENTWISE["adam"]
    models = [DistributedDataParallel(Model(dtype), comm, bucket_mb=2e-4) for _ in range(2)]
    train(models[0], make(one_group(models[0].module)), comm.rank, range(4))
    train(models[1], ShardedOptimizer(models[1], make), comm.rank, range(4))
    assert_same_bits(models[1].module, models[0].module)


SCHEDULES: dict[str, Callable[[optim.Optimizer], optim.lr_scheduler.LRScheduler]] = {
    "step": lambda optimizer: optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.3),
    "one_cycle": lambda optimizer: optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
    "warm_up": lambda optimizer: optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        ],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_schedules(comm: Communicator, schedule: str) -> None:
    make = ELEMENTWISE["momentum"]
    plain, sharded = wrapped(comm), wrapped(comm)
    optimizers = [make(several_groups(plain.module)), ShardedOptimizer(sharded, make, several_groups(sharded.module))]
    for ddp, optimizer in zip((plain, sharded), optimizers, strict=True):
        train(ddp, optimizer, comm.rank, range(8), SCHEDULES[schedule](optimizer))
    assert_same_bits(sharded.module, plain.module)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    assert rates[0] == rates[1]


def test_accumulation(comm: Communicator) -> None:
    make = ELEMENTWISE["adam"]
    plain, sharded = wrapped(comm), wrapped(comm)
    optimizers = [make(one_group(plain.module)), ShardedOptimizer(sharded, make)]
    for ddp, optimizer in zip((plain, sharded), optimizers, strict=True):
        for step in range(4):
            optimizer.zero_grad()
            with ddp.no_sync():
                loss_of(ddp, comm.rank, 2 * step).backward()
            loss_of(ddp, comm.rank, 2 * step + 1).backward()
            optimizer.step()
    assert_same_bits(sharded.module, plain.module)


def test_gradients_may_be_cleared_by_the_wrapper(comm: Communicator) -> None:
    make = ELEMENTWISE["adam"]
    plain, sharded = wrapped(comm), wrapped(comm)
    optimizers = [make(one_group(plain.module)), ShardedOptimizer(sharded, make)]
    for ddp, optimizer in zip((plain, sharded), optimizers, strict=True):
        for step in range(3):
            ddp.zero_grad()
            loss_of(ddp, comm.rank, step).backward()
            optimizer.step()
    assert_same_bits(sharded.module, plain.module)


def test_reductions_that_would_have_to_be_added_up_are_refused(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone accumulates as ever")
    ddp = wrapped(comm)
    optimizer = ShardedOptimizer(ddp, ELEMENTWISE["sgd"])
    loss_of(ddp, comm.rank, 0).backward()
    loss_of(ddp, comm.rank, 1).backward()
    with pytest.raises(RuntimeError, match=r"no_sync\(\)"):
        optimizer.step()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping(comm: Communicator, max_norm: float, norm_type: float) -> None:
    ddp, replicas = wrapped(comm), Replicas(Model, comm.size)
    optimizer = ShardedOptimizer(ddp, ELEMENTWISE["momentum"])
    optimizers = [ELEMENTWISE["momentum"](one_group(model)) for model in replicas.models]
    for step in range(4):
        replicas.zero_grad()
        replicas.backward(loss_of, step)
        for model, each in zip(replicas.models, optimizers, strict=True):
            wanted = clip_grad_norm_(model.parameters(), max_norm, norm_type)
            each.step()
        optimizer.zero_grad()
        loss_of(ddp, comm.rank, step).backward()
        norm = optimizer.clip_grad_norm_(max_norm, norm_type)
        optimizer.step()
        torch.testing.assert_close(norm, wanted.detach())
        assert_same_parameters(ddp.module, replicas.models[0])


def test_a_closure_that_computes_the_gradients(comm: Communicator) -> None:
    make = ELEMENTWISE["adam"]
    plain, sharded = wrapped(comm), wrapped(comm)
    train(plain, make(one_group(plain.module)), comm.rank, range(3))
    optimizer = ShardedOptimizer(sharded, make)
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(sharded, comm.rank, step)
            loss.backward()
            return loss

        assert float(optimizer.step(closure).detach()) > 0
    assert_same_bits(sharded.module, plain.module)


def test_half_precision_summed_in_single_precision(comm: Communicator) -> None:
    make = ELEMENTWISE["adam"]
    models = [
        DistributedDataParallel(Model(torch.bfloat16), comm, bucket_mb=2e-4, reduce_dtype=torch.float32)
        for _ in range(2)
    ]
    train(models[0], make(one_group(models[0].module)), comm.rank, range(4))
    train(models[1], ShardedOptimizer(models[1], make), comm.rank, range(4))
    assert_same_bits(models[1].module, models[0].module)


def test_half_precision_is_clipped_before_it_is_rounded(comm: Communicator) -> None:
    ddp = DistributedDataParallel(Model(torch.bfloat16), comm, bucket_mb=2e-4, reduce_dtype=torch.float32)
    optimizer = ShardedOptimizer(ddp, lambda groups: optim.SGD(groups, lr=1.0))
    before = copy.deepcopy(ddp.module)
    for max_norm, moves in ((0.0, False), (1.0, True)):
        optimizer.zero_grad()
        loss_of(ddp, comm.rank, 0).backward()
        optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
        assert torch.equal(ddp.module.get_parameter("scale"), before.get_parameter("scale")) is not moves


def test_dtypes_mixed_in_a_bucket_are_refused(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone has no buckets")
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16())
    ddp = DistributedDataParallel(mixed, comm, reduce_dtype=torch.float32)
    with pytest.raises(ValueError, match="reduce_dtype"):
        ShardedOptimizer(ddp, ELEMENTWISE["sgd"])


def test_a_communication_hook_keeps_its_say(comm: Communicator) -> None:
    def hook(state: Communicator, bucket: Any) -> Any:
        return state.all_reduce(bucket.buffer().mul_(3 / state.size))

    plain, sharded = wrapped(comm), wrapped(comm)
    for ddp in (plain, sharded):
        ddp.register_comm_hook(comm, hook)
    make = ELEMENTWISE["momentum"]
    train(plain, make(one_group(plain.module)), comm.rank, range(4))
    train(sharded, ShardedOptimizer(sharded, make), comm.rank, range(4))
    assert_same_parameters(sharded.module, plain.module)


def test_lbfgs_is_refused_in_one_clear_line(comm: Communicator) -> None:
    ddp = wrapped(comm)
    with pytest.raises(ValueError, match=r"LBFGS") as caught:
        ShardedOptimizer(ddp, lambda groups: optim.LBFGS(groups[0]["params"]))
    assert "\n" not in str(caught.value)


def test_sparse_gradients_are_refused_by_name(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone does what the optimizer does")
    ddp = DistributedDataParallel(nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1)), comm)
    with pytest.raises(ValueError, match=r"'0\.weight' is sparse"):
        ShardedOptimizer(ddp, ELEMENTWISE["sgd"])


def test_parameters_frozen_later_need_a_new_one(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone does what the optimizer does")
    ddp = wrapped(comm)
    optimizer = ShardedOptimizer(ddp, ELEMENTWISE["adam"])
    train(ddp, optimizer, comm.rank, range(2))
    ddp.module.get_submodule("third").requires_grad_(False)
    with pytest.raises(RuntimeError, match="make a new one"):
        train(ddp, optimizer, comm.rank, range(2, 3))
    plain = wrapped(comm)
    plain.module.load_state_dict(ddp.module.state_dict())
    plain.module.get_submodule("third").requires_grad_(False)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    train(plain, ELEMENTWISE["adam"]([{"params": trained}]), comm.rank, range(3, 6))
    train(ddp, ShardedOptimizer(ddp, ELEMENTWISE["adam"]), comm.rank, range(3, 6))
    assert_same_bits(ddp.module, plain.module)


@pytest.mark.parametrize("names", [("adamw", "adafactor"), ("adafactor", "adamw"), ("sgd", "sgd")])
def test_a_second_one_replaces_the_first(comm: Communicator, names: tuple[str, str]) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone does what the optimizer does")
    makes = {**ELEMENTWISE, **WHOLE}
    plain, sharded = wrapped(comm), wrapped(comm)
    first = ShardedOptimizer(sharded, makes[names[0]])
    second = ShardedOptimizer(sharded, makes[names[1]])
    train(plain, makes[names[1]](one_group(plain.module)), comm.rank, range(3))
    train(sharded, second, comm.rank, range(3))
    assert_same_parameters(sharded.module, plain.module)
    with pytest.raises(RuntimeError, match="make a new one"):
        first.step()


def test_a_parameter_group_cannot_be_added(comm: Communicator) -> None:
    optimizer = ShardedOptimizer(wrapped(comm), ELEMENTWISE["sgd"])
    with pytest.raises(RuntimeError, match="make a new one"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_bad_gradients_are_named_here_too(comm: Communicator) -> None:
    ddp = wrapped(comm, check_finite=True)
    optimizer = ShardedOptimizer(ddp, ELEMENTWISE["sgd"])
    loss_of(ddp, comm.rank, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss_of(ddp, comm.rank, 1) + (math.nan if comm.rank == comm.size - 1 else 0.0) * ddp.module.get_parameter(
        "scale"
    )
    with pytest.raises(NonFiniteError, match=rf"rank {comm.size - 1}: scale"):
        loss.backward()


def test_uneven_inputs_are_refused_clearly(comm: Communicator) -> None:
    """Ranks that have left `join` would not take part in the steps of the others."""
    if comm.size == 1:
        pytest.skip("needs a second rank")
    ddp = wrapped(comm)
    optimizer = ShardedOptimizer(ddp, ELEMENTWISE["sgd"])
    with pytest.raises(RuntimeError, match="join"), ddp.join():
        train(ddp, optimizer, comm.rank, range(2))


def test_torchs_zero_redundancy_optimizer_agrees(comm: Communicator, gloo: Any) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 1))

    def loss(model: nn.Module, step: int) -> Tensor:
        inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + comm.rank))
        return model(inputs).square().mean()

    ours = DistributedDataParallel(make(), comm, bucket_mb=1e-4)
    theirs = nn.parallel.DistributedDataParallel(make(), process_group=gloo)
    optimizers: list[optim.Optimizer] = [
        ShardedOptimizer(ours, ELEMENTWISE["adamw"]),
        ZeroRedundancyOptimizer(theirs.parameters(), optim.AdamW, process_group=gloo, lr=0.01),
    ]
    for ddp, optimizer in zip((ours, theirs), optimizers, strict=True):
        for step in range(5):
            optimizer.zero_grad()
            loss(ddp, step).backward()
            optimizer.step()
    assert_same_parameters(ours.module, theirs.module)
