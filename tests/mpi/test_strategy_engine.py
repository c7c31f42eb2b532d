"""What strategies make of the gradient engine's options: sharding, buffers, synchronised batch norm, codecs, checks."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd import convert_sync_batchnorm
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.options import CODECS, CompressionOptions
from allreduce_sgd.errors import ConfigError, NonFiniteError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.gradients.sync_batch_norm import close_sync_batchnorm
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.optim.schedule import build_schedule
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.options import StrategyOptions
from tests.mpi.test_strategies import assert_same, mini_batch, network, part_of, strategy_on, train

ADAM = OptimizerOptions(optimizer="adam", lr=0.01)
LOCAL = StrategyOptions(strategy="local", period=3)


def assert_agreed(comm: Communicator, model: nn.Module) -> None:
    assert len(set(all_gather_object(comm, parameters_sha256(model)))) == 1


# ---- sharding


def test_sharding_is_chosen_where_it_saves_something(comm: Communicator) -> None:
    def sharded(options: OptimizerOptions = ADAM, on: Communicator = comm, **more: Any) -> bool:
        return strategy_on(on, network(bias=False), None, options, GradientOptions(), **more).sharded is not None

    assert sharded() == (comm.size > 1)
    assert not sharded(on=SingleCommunicator())
    assert not sharded(OptimizerOptions(optimizer="lbfgs"))
    assert not sharded(OptimizerOptions(optimizer="muon"))
    assert not sharded(compression=CompressionOptions("bf16"))
    strategy = strategy_on(comm, network(), LOCAL, ADAM, GradientOptions())
    assert strategy.sharded is None


def test_a_whole_gradient_or_a_sparse_one_cannot_be_sharded(comm: Communicator) -> None:
    wanted = GradientOptions(shard_optimizer=True)
    with pytest.raises(ConfigError, match="--shard-optimizer: LBFGS decides by the whole gradient"):
        strategy_on(comm, network(), None, OptimizerOptions(optimizer="lbfgs"), wanted)
    model = nn.Sequential(nn.EmbeddingBag(5, 4, sparse=True), nn.Linear(4, 3))
    with pytest.raises(ConfigError, match="--shard-optimizer: the model has embeddings with sparse gradients"):
        strategy_on(comm, model, None, OptimizerOptions(momentum=0.0), wanted)
    assert strategy_on(comm, model, None, OptimizerOptions(momentum=0.0), GradientOptions()).sharded is None


def course(strategy: Strategy, steps: range, count: int, total: int = 20, state: Any = None) -> Any:
    """Train with a schedule, on from `state`, and return the state that a checkpoint would hold."""
    schedule = build_schedule(OptimizerOptions(lr_schedule="cosine"), strategy.optimizer, total)
    if state is not None:
        strategy.model.load_state_dict(state[0])
        strategy.optimizer.load_state_dict(copy.deepcopy(state[1]))
        schedule.load_state_dict(state[2])
    for step in steps:
        strategy.step(part_of(mini_batch(step, count), strategy.comm.rank, strategy.comm.size))
        schedule.step()
    return copy.deepcopy((strategy.model.state_dict(), strategy.optimizer.state_dict(), schedule.state_dict()))


@pytest.mark.parametrize("options", [OptimizerOptions(lr=0.1, momentum=0.9), ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("count", [1, 13])
def test_a_run_goes_on_sharded_or_not_from_the_same_checkpoint(
    comm: Communicator, options: OptimizerOptions, count: int
) -> None:
    def make(shard: bool) -> Strategy:
        return strategy_on(comm, network(), None, options, GradientOptions(shard_optimizer=shard))

    states = [course(make(shard), range(10), count) for shard in (False, True)]
    torch.testing.assert_close(states[0], states[1])
    models = []
    for shard in (False, True):
        for state in states:
            strategy = make(shard)
            rate = course(strategy, range(10, 20), count, state=state)[1]["param_groups"][0]["lr"]
            assert rate == pytest.approx(0.0, abs=1e-9)
            models.append(strategy.model)
    for model in models[1:]:
        assert_same(model, models[0])


# ---- buffers


def statistics(model: nn.Module) -> Tensor:
    layer: Any = model.get_submodule("0")
    return layer.running_mean


def normalised(synchronised: bool = False) -> nn.Module:
    """A network whose first layer's statistics are those of its inputs alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(5, momentum=0.5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.mark.parametrize("name", ["sync", "local"])
@pytest.mark.parametrize("how", ["leave", "average", "broadcast"])
def test_buffers_follow_the_rule(comm: Communicator, name: str, how: str) -> None:
    strategy = strategy_on(
        comm,
        normalised(),
        StrategyOptions(strategy=name, period=2),
        gradients=GradientOptions(buffers=how, shard_optimizer=False),
    )
    count, views = 4 * comm.size, [torch.zeros(5, dtype=torch.float64)] * comm.size

    def made_equal() -> list[Tensor]:
        if how == "leave":
            return views
        return [views[0] if how == "broadcast" else torch.stack(views).mean(0)] * comm.size

    for step in range(4):
        inputs = mini_batch(step, count)[0].view(comm.size, 4, 5)
        if name == "sync":
            views = made_equal()
        views = [0.5 * view + 0.5 * own.mean(0) for view, own in zip(views, inputs, strict=True)]
        train_one(strategy, step, count)
        if name == "local" and step % 2 == 1 and comm.size > 1:
            views = made_equal()
        torch.testing.assert_close(statistics(strategy.model), views[comm.rank])
    expected = views[0] if how == "broadcast" else torch.stack(views).mean(0)
    with strategy.consensus():
        torch.testing.assert_close(statistics(strategy.model), expected)
    torch.testing.assert_close(statistics(strategy.model), views[comm.rank])
    strategy.finish()
    torch.testing.assert_close(statistics(strategy.model), expected)


def train_one(strategy: Strategy, step: int, count: int) -> None:
    strategy.step(part_of(mini_batch(step, count), strategy.comm.rank, strategy.comm.size))


@pytest.mark.parametrize("shard", [False, True])
def test_synchronised_batch_norm_equals_serial_also_with_unequal_shares(comm: Communicator, shard: bool) -> None:
    options, count = OptimizerOptions(lr=0.1, momentum=0.9), 3 * comm.size + 1
    expected = normalised()
    optimizer = build_optimizer(options, expected.parameters())
    for step in range(10):
        inputs, targets = mini_batch(step, count)
        optimizer.zero_grad()
        functional.cross_entropy(expected(inputs), targets).backward()
        optimizer.step()
    model = convert_sync_batchnorm(normalised(), comm)
    gradients = GradientOptions(sync_batch_norm=True, shard_optimizer=shard)
    strategy = strategy_on(comm, model, None, options, gradients)
    train(strategy, comm, 10, count)
    assert_same(model, expected)
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()))
    close_sync_batchnorm(model)


# ---- compression


@pytest.mark.parametrize("name", ["sync", "local"])
@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_compressed_courses_agree_and_learn(comm: Communicator, name: str, codec: str) -> None:
    if (name, codec) == ("local", "dgc"):
        pytest.skip("has no gradients to correct the momentum of")
    strategy = strategy_on(
        comm,
        network(torch.float32),
        StrategyOptions(strategy=name, period=2),
        OptimizerOptions(lr=0.05, momentum=0.0),
        compression=CompressionOptions(codec),
        seed=3,
    )
    inputs, targets = mini_batch(0, 12, torch.float32)

    def loss() -> float:
        return float(functional.cross_entropy(strategy.model(inputs), targets).detach())

    before = loss()
    for _ in range(60):
        strategy.step(part_of((inputs, targets), comm.rank, comm.size))
    strategy.finish()
    assert loss() < before - 0.05
    assert_agreed(comm, strategy.model)


@pytest.mark.parametrize("name", ["sync", "local"])
def test_sending_every_element_is_no_compression(comm: Communicator, name: str) -> None:
    models = []
    for compression in (CompressionOptions(), CompressionOptions("top-k", compression_ratio=1.0)):
        options = StrategyOptions(strategy=name, period=3)
        strategy = strategy_on(comm, network(), options, compression=compression)
        models.append(train(strategy, comm, 9, 13))
    assert_same(models[1], models[0])


def test_what_local_exchanges_leave_out_is_kept(comm: Communicator) -> None:
    """The average of the models before an exchange is the new anchor less what all ranks have not sent yet."""
    plain = strategy_on(comm, network(), LOCAL)
    codec = CompressionOptions("top-k", compression_ratio=0.3)
    compressed = strategy_on(comm, network(), LOCAL, compression=codec)
    average = train(plain, comm, 3, 12)
    sent = train(compressed, comm, 3, 12)
    if comm.size == 1:
        assert_same(sent, average)
        return
    assert_agreed(comm, sent)
    (state,) = compressed.state_dict()["fragments"]
    anchors = torch.cat(state["anchors"])
    # Buckets are filled from the last parameter on.
    averages = torch.cat([one.detach().flatten() for one in reversed(list(average.parameters()))])
    residuals = torch.cat([codec["residual"] for codec in state["codecs"]])
    comm.all_reduce(residuals).wait()
    assert residuals.abs().max() > 1e-3
    torch.testing.assert_close(anchors - residuals, averages)


# ---- going on


@pytest.mark.parametrize(
    ("name", "compression", "precision"),
    [
        ("sync", "none", "fp32"),
        ("sync", "top-k", "fp16"),
        ("sync", "dgc", "fp32"),
        ("sync", "int8", "fp32"),
        ("sync", "powersgd", "fp32"),
        ("local", "sign", "fp16"),
        ("local", "random-k", "fp32"),
    ],
)
def test_a_strategy_goes_on_bit_for_bit_with_codecs_and_the_order_of_buckets(
    comm: Communicator, name: str, compression: str, precision: str
) -> None:
    def make() -> Strategy:
        return strategy_on(
            comm,
            network(torch.float32),
            StrategyOptions(strategy=name, period=3),
            OptimizerOptions(lr=0.1, momentum=0.5),
            compression=CompressionOptions(compression),
            precision=precision,
        )

    whole = make()
    train(whole, comm, 4, 12)
    model, optimizer, state, scaling = copy.deepcopy(
        (
            whole.model.state_dict(),
            whole.optimizer.state_dict(),
            whole.state_dict(),
            None if whole.scaling is None else whole.scaling.state_dict(),
        )
    )
    if name == "sync" and compression == "none" and comm.size > 1:
        assert sorted(state["bucket_order"]) == [0, 1, 2, 3]
    train(whole, comm, 4, 12)
    resumed = make()
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    if resumed.scaling is not None and scaling is not None:
        resumed.scaling.load_state_dict(scaling)
    resumed.load_state_dict(state)
    train(resumed, comm, 4, 12)
    assert parameters_sha256(resumed.model) == parameters_sha256(whole.model)


# ---- checks


def spoilt(share: Share, how: Callable[[nn.Module, Tensor], Tensor]) -> Share:
    first, *others = share.losses
    return Share([lambda model: how(model, first(model)), *others], share.samples, share.global_samples)


def spoil_the_last_weight(model: nn.Module, loss: Tensor) -> Tensor:
    """Return a loss that is finite, and whose gradient is not, for one parameter."""
    weight = list(model.parameters())[2]
    return loss + torch.sqrt((weight - weight.detach()).sum())


@pytest.mark.parametrize(("name", "shard"), [("sync", False), ("sync", True), ("local", False)])
def test_a_gradient_that_is_not_finite_is_named(comm: Communicator, name: str, shard: bool) -> None:
    strategy = strategy_on(
        comm,
        network(),
        StrategyOptions(strategy=name),
        gradients=GradientOptions(check_finite=True, shard_optimizer=shard),
    )
    last = comm.size - 1
    train(strategy, comm, 3, 12)
    share = part_of(mini_batch(3, 12), comm.rank, comm.size)
    if comm.rank == last:
        share = spoilt(share, spoil_the_last_weight)
    if name == "local" and comm.rank != last:
        # Stopping the others is the failing rank's exit's business.
        strategy.step(share)
        return
    told = f"NaN or Inf in the gradient of 2.weight of rank {last}$"
    if name == "sync":
        told = rf"NaN or Inf in the gradient of rank {last}: 2\.weight$"
    with pytest.raises(NonFiniteError, match=told):
        strategy.step(share)


def test_a_loss_that_is_not_finite_is_told_by_local_sgd(comm: Communicator) -> None:
    strategy = strategy_on(comm, network(), LOCAL, gradients=GradientOptions(check_finite=True))
    share = spoilt(part_of(mini_batch(0, 12), comm.rank, comm.size), lambda model, loss: loss + math.nan)
    with pytest.raises(NonFiniteError, match=f"NaN or Inf in the loss of rank {comm.rank}"):
        strategy.step(share)


def test_a_large_gradient_is_not_an_infinite_one(comm: Communicator) -> None:
    """The sum of its squares overflows, which a check by the norm alone would take for an infinity."""
    strategy = strategy_on(
        comm,
        network(torch.float32),
        LOCAL,
        OptimizerOptions(lr=0.0, momentum=0.0),
        GradientOptions(check_finite=True),
    )
    share = part_of(mini_batch(0, 12, torch.float32), comm.rank, comm.size)
    strategy.step(spoilt(share, lambda model, loss: loss * 1e30))


def test_an_unused_parameter_is_accepted_or_named(comm: Communicator) -> None:
    def make(find: bool) -> Strategy:
        model = network()
        model.register_parameter("forgotten", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        options = OptimizerOptions(lr=0.1, momentum=0.9, weight_decay=0.1)
        return strategy_on(comm, model, None, options, GradientOptions(find_unused_parameters=find))

    strategy = make(True)
    train(strategy, comm, 3, 12)
    # Not touched, by weight decay neither.
    assert strategy.model.get_parameter("forgotten").tolist() == [1.0, 1.0]
    if comm.size > 1:
        with pytest.raises(RuntimeError, match="got no gradient in this backward pass: forgotten"):
            train(make(False), comm, 1, 12)


def test_a_static_graph_trains_alike(comm: Communicator) -> None:
    models = [
        train(strategy_on(comm, network(), gradients=GradientOptions(static_graph=static)), comm, 5, 13, rounds=2)
        for static in (False, True)
    ]
    assert_same(models[0], models[1])
