"""ShardedOptimizer: the same bits as the optimizer it shards, with a part of its state on every rank."""

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
from tests.mpi.replicas import Replicas, assert_same_parameters

Make = Callable[[Groups], optim.Optimizer]

ELEMENTWISE: dict[str, Make] = {
    "sgd": lambda groups: optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.1),
    "nesterov": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd_foreach": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda groups: optim.Adam(groups, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda groups: optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: optim.AdamW(groups, lr=0.01),
    "adamw_foreach": lambda groups: optim.AdamW(groups, lr=0.01, foreach=True),
    "adagrad": lambda groups: optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda groups: optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "adadelta": lambda groups: optim.Adadelta(groups),
    "adamax": lambda groups: optim.Adamax(groups, lr=0.01),
    "nadam": lambda groups: optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: optim.RAdam(groups, lr=0.01),
    "asgd": lambda groups: optim.ASGD(groups, lr=0.01),
    "rprop": lambda groups: optim.Rprop(groups, lr=0.01),
}


class Model(nn.Module):
    """Odd sizes, a scalar, an empty and a never used parameter, and a layer that is used in some steps only."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(7, 13), nn.Linear(13, 11), nn.Linear(11, 3)
        self.convolution = nn.Conv2d(3, 5, 3)
        self.convolution.weight = nn.Parameter(self.convolution.weight.detach().to(memory_format=torch.channels_last))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.idle = nn.Parameter(torch.ones(17))
        self.sometimes = nn.Linear(3, 3, bias=False)
        self.to(dtype)

    def forward(self, inputs: Tensor, sometimes: bool) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(inputs))))
        outputs = self.scale * self.third(hidden)
        if sometimes:
            outputs = outputs + self.sometimes(outputs)
        image = hidden.reshape(-1)[: 3 * 3 * 3].reshape(1, 3, 3, 3)
        return outputs.square().mean() + self.convolution(image).square().mean()


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(inputs.to(next(model.parameters()).dtype), step % 3 == 1)


def wrapped(comm: Communicator, bucket_mb: float = 2e-4, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(Model(), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb, **options)


def one_group(module: nn.Module) -> Groups:
    return [{"params": list(module.parameters())}]


def several_groups(module: Any) -> Groups:
    """Options and orders of their own: the groups cut through buckets, and do not follow the module's order."""
    return [
        {"params": [module.third.weight, module.first.weight], "lr": 0.03},
        {"params": [module.first.bias, module.idle, module.sometimes.weight]},
        {"params": [module.scale, module.second.weight, module.convolution.weight], "weight_decay": 0.1},
        {"params": [module.empty, module.third.bias, module.second.bias, module.convolution.bias]},
    ]


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    rank: int,
    steps: range,
    scheduler: optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same_bits(module: nn.Module, expected: nn.Module) -> None:
    for name, wanted in expected.named_parameters():
        differing = int((module.get_parameter(name) != wanted).sum())
        assert differing == 0, f"{name}: {differing} of {wanted.numel()} elements differ"


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


def assert_same_state(given: Any, wanted: Any, where: str = "state") -> None:
    """Assert that two state_dicts are equal, to the bit."""
    if isinstance(wanted, dict):
        assert given.keys() == wanted.keys(), where
        for key in wanted:
            assert_same_state(given[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(given) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_same_state(given[index], value, f"{where}.{index}")
    elif isinstance(wanted, Tensor):
        assert given.dtype is wanted.dtype, where
        assert torch.equal(given, wanted), where
    else:
        assert given == wanted, where


@pytest.fixture(scope="module")
def pair(comm: Communicator) -> Iterator[Communicator]:
    """Two ranks each, or one."""
    made = comm.split(comm.rank // 2)
    yield made
    made.close()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_state_is_that_of_the_unsharded_one_and_goes_to_any_number_of_ranks(
    comm: Communicator, pair: Communicator, name: str
) -> None:
    make, groups_of = ELEMENTWISE[name], several_groups
    plain, sharded = wrapped(comm), wrapped(comm)
    before = make(groups_of(plain.module))
    train(plain, before, comm.rank, range(3))
    optimizer = ShardedOptimizer(sharded, make, groups_of(sharded.module))
    train(sharded, optimizer, comm.rank, range(3))
    wanted, state = before.state_dict(), optimizer.state_dict()
    # No rank has a shard of an empty parameter, so there is no state for it.
    for place, parameter in enumerate(one for group in groups_of(plain.module) for one in group["params"]):
        if parameter.numel() == 0:
            wanted["state"].pop(place, None)
            state["state"].pop(place, None)
    assert_same_state(state, wanted)

    # Pairs of ranks go on from it, sharded or not, each pair by itself.
    followers = []
    for shard in (False, True):
        ddp = DistributedDataParallel(Model(), pair, bucket_mb=1e-4)
        ddp.module.load_state_dict(sharded.module.state_dict())
        follower = ShardedOptimizer(ddp, make, groups_of(ddp.module)) if shard else make(groups_of(ddp.module))
        # torch's optimizers keep the tensors that they are given.
        follower.load_state_dict(copy.deepcopy(state))
        train(ddp, follower, comm.rank, range(3, 5))
        followers.append(ddp.module)
    assert_same_bits(followers[1], followers[0])


WHOLE: dict[str, Make] = {"adafactor": lambda groups: optim.Adafactor(groups, lr=0.05)}
if hasattr(optim, "Muon"):
    WHOLE["muon"] = lambda groups: optim.Muon(groups, lr=0.05)


@pytest.mark.parametrize("name", WHOLE)
def test_optimizers_that_need_whole_parameters(comm: Communicator, name: str) -> None:
    def matrices(module: Any) -> Groups:
        return [{"params": [module.first.weight, module.second.weight, module.third.weight]}]

    make = WHOLE[name]
    plain, sharded = wrapped(comm), wrapped(comm)
    before = make(matrices(plain.module))
    after = ShardedOptimizer(sharded, make, matrices(sharded.module))
    train(plain, before, comm.rank, range(4))
    train(sharded, after, comm.rank, range(4))
    assert_same_parameters(sharded.module, plain.module)
    assert not torch.equal(sharded.module.get_parameter("first.weight"), Model().first.weight)
    state = after.state_dict()
    after.load_state_dict(copy.deepcopy(state))
    before.load_state_dict(copy.deepcopy(state))
    train(plain, before, comm.rank, range(4, 6))
    train(sharded, after, comm.rank, range(4, 6))
    assert_same_parameters(sharded.module, plain.module)


@pytest.mark.parametrize("bucket_mb", [0.2, 25.0])
def test_the_state_of_a_rank_is_its_part(comm: Communicator, bucket_mb: float) -> None:
    model = nn.Sequential(nn.Linear(300, 401), nn.Linear(401, 300))
    ddp = DistributedDataParallel(model, comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb)
    optimizer = ShardedOptimizer(ddp, ELEMENTWISE["adam"])
    ddp(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    moments_bytes = 2 * 4 * sum(parameter.numel() for parameter in ddp.parameters())
    assert optimizer.state_bytes() == pytest.approx(moments_bytes / comm.size, rel=0.01)
    everyone = comm.all_reduce(torch.tensor([optimizer.state_bytes()])).wait()
    # A scalar for each of the four parameters counts its steps.
    assert moments_bytes < int(everyone) <= moments_bytes + 4 * 4 * comm.size


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
