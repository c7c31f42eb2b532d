"""Anchored methods against their formulas, simulated for all ranks in one process, and against one another."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.options import CODECS, CompressionOptions
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.anchored import Anchored
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.bmuf import Bmuf
from allreduce_sgd.strategies.diloco import DiLoCo
from allreduce_sgd.strategies.elastic import Elastic
from allreduce_sgd.strategies.local import Local, PostLocal
from allreduce_sgd.strategies.method import Method
from allreduce_sgd.strategies.period import Period
from allreduce_sgd.strategies.slowmo import SlowMo
from tests.mpi.anchoring import Merge, Outer, World, anchored, average, carry, replace, simulate
from tests.mpi.test_strategies import assert_same, mini_batch, network, part_of, serial, strategy_on, train

LR = 0.1
MOMENTUM = OptimizerOptions(lr=LR, momentum=0.9)
ADAM = OptimizerOptions(optimizer="adam", lr=0.01)
METHODS: dict[str, Callable[[int], Method]] = {
    "local": lambda ranks: Local(),
    "slowmo": lambda ranks: SlowMo(),
    "bmuf": lambda ranks: Bmuf(ranks),
    "diloco": lambda ranks: DiLoCo(),
    "easgd": lambda ranks: Elastic(ranks),
}
LATE = ["local", "slowmo", "bmuf", "diloco"]


def assert_equal_on_all(comm: Communicator, model: nn.Module) -> None:
    assert len(set(all_gather_object(comm, parameters_sha256(model)))) == 1


def sent_bytes(comm: Communicator) -> int:
    return comm.traffic.bytes_sent or 0


def anchors_of(strategy: Anchored) -> list[Tensor]:
    return [anchor.clone() for fragment in strategy.state_dict()["fragments"] for anchor in fragment["anchors"]]


# ---- against the formulas


def slow_momentum(z: Tensor, mean: Tensor, kept: dict[str, Tensor]) -> Tensor:
    kept["u"] = 0.6 * kept.get("u", torch.zeros_like(z)) + (z - mean) / LR
    return z - 1.5 * LR * kept["u"]


def block_momentum(z: Tensor, mean: Tensor, kept: dict[str, Tensor]) -> Tensor:
    kept["d"] = 0.75 * kept.get("d", torch.zeros_like(z)) + 0.9 * (mean - z)
    return z + kept["d"]


def nesterov(z: Tensor, mean: Tensor, kept: dict[str, Tensor]) -> Tensor:
    """The step of torch's own SGD."""
    parameter = nn.Parameter(z.clone())
    parameter.grad = z - mean
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    if "m" in kept:
        optimizer.state[parameter]["momentum_buffer"] = kept["m"]
    optimizer.step()
    kept["m"] = optimizer.state[parameter]["momentum_buffer"]
    return parameter.detach()


def mixed(x: Tensor, sent: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return 0.7 * new + 0.3 * x


FORMULAS: list[tuple[Method, Outer, Merge, int]] = [
    (Local(), average, replace, 0),
    (Local(), average, carry, 2),
    (SlowMo(1.5, 0.6), slow_momentum, replace, 0),
    (SlowMo(1.5, 0.6), slow_momentum, carry, 1),
    (Bmuf(4, 0.9), block_momentum, replace, 0),
    (Bmuf(4, 0.9), block_momentum, carry, 2),
    (DiLoCo(), nesterov, replace, 0),
    (DiLoCo(mixing=0.3), nesterov, mixed, 2),
]


@pytest.mark.parametrize(("method", "outer", "merge", "delay"), FORMULAS)
@pytest.mark.parametrize("count", [1, 7, 12])
def test_courses_are_those_of_the_formulas(
    comm: Communicator, method: Method, outer: Outer, merge: Merge, delay: int, count: int
) -> None:
    world = World(comm.size, count, MOMENTUM)
    anchors = simulate(world, 14, 4, outer, merge, delay)
    strategy = anchored(comm, method, 4, MOMENTUM, delay=delay)
    train(strategy, comm, 14, count)
    assert_same(strategy.model, world.models[comm.rank])
    if not method.averages:
        # Buckets are filled from the last parameter on.
        expected = torch.cat([anchor.flatten() for anchor in reversed(anchors)])
        torch.testing.assert_close(torch.cat(anchors_of(strategy)), expected)


@pytest.mark.parametrize(("method", "outer", "merge", "delay"), [FORMULAS[1], FORMULAS[2]])
def test_courses_are_the_same_over_every_back_end(
    any_comm: Communicator, method: Method, outer: Outer, merge: Merge, delay: int
) -> None:
    world = World(any_comm.size, 7, MOMENTUM)
    simulate(world, 10, 4, outer, merge, delay)
    strategy = anchored(any_comm, method, 4, MOMENTUM, delay=delay)
    assert_same(train(strategy, any_comm, 10, 7), world.models[any_comm.rank])


# Of 30, 6, 18 and 3 elements: about as many in each of the parts.
PARTS = {2: [[0], [1, 2, 3]], 3: [[0], [2], [1, 3]], 4: [[0], [2], [1], [3]]}


@pytest.mark.parametrize("fragments", [2, 3, 4])
@pytest.mark.parametrize(("delay", "merge"), [(0, replace), (2, mixed), (4, mixed)])
def test_streaming_fragments_take_turns(comm: Communicator, fragments: int, delay: int, merge: Merge) -> None:
    world = World(comm.size, 7, MOMENTUM)
    anchors = simulate(world, 19, 6, nesterov, merge, delay, PARTS[fragments])
    strategy = anchored(comm, DiLoCo(mixing=0.3), 6, MOMENTUM, delay=delay, fragments=fragments)
    train(strategy, comm, 19, 7)
    assert_same(strategy.model, world.models[comm.rank])
    with strategy.consensus():
        for mine, expected in zip(strategy.model.parameters(), anchors, strict=True):
            torch.testing.assert_close(mine.detach(), expected)


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("period", [1, 2])
def test_elastic_averaging_is_its_formula(comm: Communicator, count: int, period: int) -> None:
    world = World(comm.size, count, OptimizerOptions(lr=LR, momentum=0.0))
    alpha = 0.9 / comm.size

    def elastic(x: Tensor, sent: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return x - alpha * (sent - old)

    anchors = simulate(
        world,
        5,
        period,
        lambda z, mean, kept: z + alpha * comm.size * (mean - z),
        elastic,
        early=True,
        equal=True,
    )
    strategy = anchored(comm, Elastic(comm.size), period)
    train(strategy, comm, 5, count)
    assert_same(strategy.model, world.models[comm.rank])
    with strategy.consensus():
        for mine, expected in zip(strategy.model.parameters(), anchors, strict=True):
            torch.testing.assert_close(mine.detach(), expected)
        assert_equal_on_all(comm, strategy.model)
    assert_same(strategy.model, world.models[comm.rank])


def test_elastic_averaging_by_hand(comm: Communicator) -> None:
    """f_i(x) = (x - i)² / 2 on rank i, step 0.5, five steps of the paper's equations."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 2.0)
    strategy = anchored(comm, Elastic(comm.size, 0.8), 1, OptimizerOptions(lr=0.5, momentum=0.0), model)
    x, z, alpha = [2.0] * comm.size, 2.0, 0.8 / comm.size

    def loss(module: Any) -> Tensor:
        return ((module.weight - comm.rank) ** 2).sum() / 2

    for _ in range(5):
        x, z = (
            [each - 0.5 * (each - rank) - alpha * (each - z) for rank, each in enumerate(x)],
            z + alpha * sum(each - z for each in x),
        )
        strategy.step(Share([loss], 1, comm.size))
    assert model.weight.item() == pytest.approx(x[comm.rank], rel=1e-12)
    with strategy.consensus():
        assert model.weight.item() == pytest.approx(z, rel=1e-12)


def test_slow_momentum_follows_the_learning_rate() -> None:
    """u is in units of gradients, so that it moves z less while the rate is lower; a rate of 0 divides nothing by 0."""
    z, u = torch.tensor([1.0, 2.0]), torch.zeros(2)
    method = SlowMo(outer_lr=0.5, momentum=0.8)
    expected_z, expected_u = z.clone(), u.clone()
    for lr, pull in ((0.1, 1.0), (0.05, 2.0), (0.2, -1.0)):
        method.outer(z, torch.full((2,), pull), u, lr)
        expected_u = 0.8 * expected_u + pull / lr
        expected_z = expected_z - 0.5 * lr * expected_u
        torch.testing.assert_close((z, u), (expected_z, expected_u))
    for lr in (0.0, 1e-40):
        method.outer(z, torch.full((2,), 3.0), u, lr)
        expected_u, expected_z = 0.8 * expected_u, expected_z - 0.5 * 3.0
        torch.testing.assert_close((z, u), (expected_z, expected_u))


def test_one_rank_makes_the_outer_steps(comm: Communicator) -> None:
    alone = SingleCommunicator()
    for method, outer in ((SlowMo(1.5, 0.6), slow_momentum), (DiLoCo(), nesterov)):
        world = World(1, 6, MOMENTUM)
        simulate(world, 10, 3, outer, replace)
        assert_same(train(anchored(alone, method, 3, MOMENTUM), alone, 10, 6), world.models[0])


@pytest.mark.parametrize("method", [Local(), PostLocal(), SlowMo(momentum=0.0), Bmuf(1)])
def test_one_rank_whose_outer_step_is_an_average_is_serial_bit_for_bit(comm: Communicator, method: Method) -> None:
    alone = SingleCommunicator()
    strategy = anchored(alone, method, 3, MOMENTUM)
    train(strategy, alone, 10, 6)
    strategy.finish()
    assert parameters_sha256(strategy.model) == parameters_sha256(serial(MOMENTUM, 10, 6))


# ---- against one another


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("method", [SlowMo(momentum=0.0), Bmuf(4, momentum=0.0)])
def test_without_outer_momentum_it_is_local_sgd(comm: Communicator, method: Method, delay: int) -> None:
    models = [train(anchored(comm, each, 3, MOMENTUM, delay=delay), comm, 10, 7) for each in (Local(), method)]
    assert parameters_sha256(models[0]) == parameters_sha256(models[1])


@pytest.mark.parametrize("codec", ["none", "top-k"])
def test_outer_sgd_with_step_1_is_averaging(comm: Communicator, codec: str) -> None:
    compression = CompressionOptions(codec, compression_ratio=None if codec == "none" else 0.3)
    methods = Local(), DiLoCo(1.0, 0.0)
    models = [train(anchored(comm, each, 3, MOMENTUM, compression=compression), comm, 10, 7) for each in methods]
    if codec == "none" or comm.size > 1:
        assert_same(models[0], models[1])


@pytest.mark.parametrize("count", [1, 7, 12])
def test_post_local_is_synchronous_up_to_the_switch(comm: Communicator, count: int) -> None:
    synchronous = train(strategy_on(comm, network()), comm, 6, count)
    strategy = anchored(comm, PostLocal(), Period(4, switch=6))
    assert_same(train(strategy, comm, 6, count), synchronous)


def test_post_local_is_synchronous_also_with_momentum(comm: Communicator) -> None:
    count = 4 * comm.size
    synchronous = train(strategy_on(comm, network(), optimizer=MOMENTUM), comm, 6, count)
    assert_same(train(anchored(comm, PostLocal(), Period(4, switch=6), MOMENTUM), comm, 6, count), synchronous)


# ---- when


@pytest.mark.parametrize(
    ("name", "period", "expected"),
    [
        *((name, Period(3), [3, 6]) for name in METHODS),
        ("local", Period(4, switch=3), [1, 2, 3, 7]),
        ("local", Period(4, "rising", 7), [1, 2, 4, 7]),
        ("local", Period(4, "falling", 7), [4, 6, 7, 8]),
    ],
)
def test_exchanges_come_first_exactly_at_the_period(
    comm: Communicator, name: str, period: Period, expected: list[int]
) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    strategy = anchored(comm, METHODS[name](comm.size), period)
    found = []
    for step in range(1, 9):
        before = sent_bytes(comm)
        strategy.step(part_of(mini_batch(step, 12), comm.rank, comm.size))
        if sent_bytes(comm) > before:
            found.append(step)
    assert found == expected
    assert strategy.figures({"fragments_measured": 0.0})["period"] == period.at(8)


def test_late_exchanges_are_taken_over_exactly_so_late(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    strategy = anchored(comm, Local(), 5, delay=3)
    alone = World(comm.size, 12, OptimizerOptions(lr=LR, momentum=0.0))
    for step in range(1, 9):
        train_one(strategy, step - 1, 12)
        alone.local_step()
        same = all(
            torch.equal(mine, own)
            for mine, own in zip(strategy.model.parameters(), alone.models[comm.rank].parameters(), strict=True)
        )
        assert same == (step < 8)


def test_all_ranks_agree_after_an_exchange_that_replaces(comm: Communicator) -> None:
    for method, agree in ((Local(), True), (DiLoCo(), True), (Elastic(comm.size), False)):
        strategy = anchored(comm, method, 2)
        assert strategy.in_agreement
        seen = []
        for step in range(4):
            train_one(strategy, step, 12)
            seen.append(strategy.in_agreement)
        if comm.size > 1:
            assert seen == [False, agree, False, agree]
            views = len(set(all_gather_object(comm, parameters_sha256(strategy.model))))
            assert (views == 1) == agree


def train_one(strategy: Anchored, step: int, count: int) -> None:
    strategy.step(part_of(mini_batch(step, count), strategy.comm.rank, strategy.comm.size))


# ---- what


def test_parameters_without_gradients_are_averaged_and_frozen_ones_are_not(comm: Communicator) -> None:
    model: Any = network()
    model.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    model[0].weight.requires_grad_(False)
    strategy = anchored(comm, Local(), 2, model=model)
    with torch.no_grad():
        model.unused.add_(comm.rank)
        model[0].weight.add_(comm.rank)
    frozen = model[0].weight.clone()
    train(strategy, comm, 2, 4 * comm.size)
    assert torch.equal(model[0].weight, frozen)
    torch.testing.assert_close(
        model.unused.detach(), torch.full((3,), (comm.size - 1) / 2, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("name", LATE)
def test_every_kind_of_parameter_is_averaged(comm: Communicator, name: str, delay: int) -> None:
    """In the first exchange, with no momentum yet: of several dtypes, and in several memory formats."""
    method = {"slowmo": SlowMo(), "bmuf": Bmuf(2), "diloco": DiLoCo(1.0, 0.0, mixing=0.0)}.get(name, Local())
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2, bias=False))
    model = model.to(memory_format=torch.channels_last)
    model.narrow = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    model.wide = nn.Parameter(torch.randn(3, 2, dtype=torch.float64).t())
    model.complex = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    model.empty = nn.Parameter(torch.ones(0, 3))
    model.single = nn.Parameter(torch.tensor(1.0))
    strategy = anchored(comm, method, 2, OptimizerOptions(lr=0.1, momentum=0.0), model, delay=delay)
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + comm.rank)
    for _ in range(2 + delay):
        strategy.step(Share([], 1, comm.size))
    for (key, after), start in zip(model.named_parameters(), before.parameters(), strict=True):
        assert after.stride() == start.stride(), key
        torch.testing.assert_close(after.detach(), start.detach() * (comm.size + 1) / 2)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("uneven", [0, 1])
def test_averaging_makes_a_model_neither_grow_nor_shrink(comm: Communicator, uneven: int, delay: int) -> None:
    """Weights such as 1/3, rounded to a float, add up to more than 1, which hundreds of averages would show."""
    counts = [7 + uneven * rank for rank in range(comm.size)]
    counts[0] += uneven * (sum(counts) % comm.size == 0)
    model = nn.Module()
    model.x = nn.Parameter(torch.ones(4000))
    strategy = anchored(comm, Local(), 1 + delay, OptimizerOptions(lr=0.0, momentum=0.0), model, delay=delay)
    expected = torch.ones(4000, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300 * (1 + delay)):
        # Moved about, so that the average is not rounded back to what it was.
        move = 1e-3 * torch.randn(4000, generator=generator)
        expected += move
        with torch.no_grad():
            model.x.add_(move)
        strategy.step(Share([], counts[comm.rank], sum(counts)))
    growth = (model.x.detach().double() / expected - 1).mean()
    assert abs(growth) < 1e-6


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("count", [1, 12])
def test_inner_state_is_kept_averaged_or_reset(comm: Communicator, optimizer: OptimizerOptions, count: int) -> None:
    names = ["momentum_buffer"] if optimizer is MOMENTUM else ["exp_avg", "exp_avg_sq"]

    def states(strategy: Anchored) -> list[list[Any]]:
        """By name and parameter, what all ranks keep; None where one keeps nothing."""
        kept = [strategy.optimizer.state.get(each, {}) for each in strategy.model.parameters()]
        mine = [[state[name].flatten().tolist() if name in state else None for state in kept] for name in names]
        return [list(zip(*each, strict=True)) for each in zip(*all_gather_object(comm, mine), strict=True)]

    trained = {}
    for how in ("keep", "average", "reset"):
        strategy = anchored(comm, Local(), 3, optimizer, inner_state=how)
        train(strategy, comm, 3, count)
        trained[how] = states(strategy)
        steps = [float(state["step"]) for state in strategy.optimizer.state.values() if "step" in state]
        assert set(steps) <= {3.0}
        # It goes on.
        train(strategy, comm, 4, count)
        assert all(torch.isfinite(parameter).all() for parameter in strategy.model.parameters())
    if comm.size == 1:
        assert trained["keep"] == trained["average"] == trained["reset"]
        return
    for kept, averaged in zip(trained["keep"], trained["average"], strict=True):
        for before, after in zip(kept, averaged, strict=True):
            assert [each is None for each in before] == [each is None for each in after]
            given = [torch.tensor(each, dtype=torch.float64) for each in before if each is not None]
            mean = torch.stack(given).sum(0) / comm.size
            for each in after:
                if each is not None:
                    torch.testing.assert_close(torch.tensor(each, dtype=torch.float64), mean)
    assert all(each is None for by_name in trained["reset"] for by_rank in by_name for each in by_rank)


@pytest.mark.parametrize("how", ["leave", "average", "broadcast"])
def test_buffers_at_an_exchange(comm: Communicator, how: str) -> None:
    model: Any = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    gradients = GradientOptions(buffers=how, bucket_mb=2e-4)
    strategy = anchored(comm, SlowMo(), 3, model=model, gradients=gradients, delay=1)
    train(strategy, comm, 3, 4 * comm.size)
    before = all_gather_object(comm, model[1].running_mean.tolist())
    assert comm.size == 1 or before[0] != before[-1]
    train_one(strategy, 3, 4 * comm.size)
    after = all_gather_object(comm, model[1].running_mean.tolist())
    if comm.size > 1:
        assert (after[0] == after[-1]) == (how != "leave")


# ---- codecs


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec not in ("none", "dgc")])
@pytest.mark.parametrize(("name", "delay"), [("slowmo", 0), ("slowmo", 2), ("diloco", 2), ("easgd", 0)])
def test_compressed_exchanges_move_one_anchor_and_learn(comm: Communicator, codec: str, name: str, delay: int) -> None:
    if comm.size > 3 and name != "diloco":
        pytest.skip("three ranks show as much of it")
    feedback = False if name == "easgd" and codec != "none" else None
    compression = CompressionOptions(codec, error_feedback=feedback)
    more: dict[str, Any] = {} if name == "easgd" else {"delay": delay, "fragments": 2 if name == "diloco" else 1}
    strategy = anchored(comm, METHODS[name](comm.size), 3, compression=compression, **more)
    inputs, targets = mini_batch(0, 12)

    def loss() -> float:
        with torch.no_grad(), strategy.consensus():
            return float(nn.functional.cross_entropy(strategy.model(inputs), targets))

    before = loss()
    for _ in range(61):
        strategy.step(part_of((inputs, targets), comm.rank, comm.size))
    assert loss() < before - 0.05
    views = all_gather_object(comm, [anchor.tolist() for anchor in anchors_of(strategy)])
    assert all(view == views[0] for view in views)
    strategy.finish()
    assert_equal_on_all(comm, strategy.model)


@pytest.mark.parametrize(("name", "delay"), [("local", 2), ("slowmo", 0), ("bmuf", 1), ("diloco", 2)])
def test_sending_every_element_is_no_compression(comm: Communicator, name: str, delay: int) -> None:
    models = [
        train(anchored(comm, METHODS[name](comm.size), 3, MOMENTUM, compression=codec, delay=delay), comm, 10, 13)
        for codec in (CompressionOptions(), CompressionOptions("top-k", compression_ratio=1.0))
    ]
    assert_same(models[1], models[0])


# ---- the consensus


@pytest.mark.parametrize(("name", "delay"), [*((name, 0) for name in METHODS), *((name, 2) for name in LATE)])
@pytest.mark.parametrize("codec", ["none", "powersgd"])
def test_the_consensus_leaves_no_trace(comm: Communicator, name: str, delay: int, codec: str) -> None:
    compression = CompressionOptions(codec, error_feedback=False if codec != "none" else None)
    more: dict[str, Any] = {} if name == "easgd" else {"delay": delay}
    looked, plain = (
        anchored(comm, METHODS[name](comm.size), 4, MOMENTUM, compression=compression, **more) for _ in range(2)
    )
    for step in range(10):
        train_one(plain, step, 7)
        train_one(looked, step, 7)
        before = parameters_sha256(looked.model)
        with looked.consensus():
            assert_equal_on_all(comm, looked.model)
            agreed = parameters_sha256(looked.model)
        assert parameters_sha256(looked.model) == before
    assert parameters_sha256(looked.model) == parameters_sha256(plain.model)
    looked.finish()
    assert parameters_sha256(looked.model) == agreed


@pytest.mark.parametrize("delay", [0, 3])
def test_the_consensus_is_the_average_of_all_models(comm: Communicator, delay: int) -> None:
    strategy = anchored(comm, SlowMo(), 4, delay=delay)
    for step in range(10):
        train_one(strategy, step, 3 * comm.size)
        own = nn.utils.parameters_to_vector(strategy.model.parameters()).detach()
        views = torch.tensor(all_gather_object(comm, own.tolist()), dtype=torch.float64)
        before = sent_bytes(comm)
        with strategy.consensus():
            agreed = nn.utils.parameters_to_vector(strategy.model.parameters()).detach()
        torch.testing.assert_close(agreed, views.mean(0))
        if comm.size > 1:
            # Where all hold the same, nothing is computed again.
            assert (sent_bytes(comm) == before) == (strategy.in_agreement and delay == 0)


# ---- measures


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("name", ["local", "slowmo", "diloco"])
@pytest.mark.parametrize("count", [7, 12])
def test_the_distance_is_that_of_models_from_their_mean(comm: Communicator, name: str, delay: int, count: int) -> None:
    world = World(comm.size, count, MOMENTUM)
    strategy = anchored(comm, METHODS[name](comm.size), 4, MOMENTUM, delay=delay)
    assert "model_distance" not in strategy.figures(strategy.measures())
    weights = [0] * comm.size
    for _ in range(4):
        weights = [weight + world.samples(rank) for rank, weight in enumerate(weights)]
        world.local_step()
    models = [nn.utils.parameters_to_vector(model.parameters()).detach() for model in world.models]
    mean = sum(weight * model for weight, model in zip(weights, models, strict=True)) / sum(weights)
    expected = math.sqrt(sum(float((model - mean).norm()) ** 2 for model in models) / comm.size)
    train(strategy, comm, 4 + delay, count)
    figures = strategy.figures(summed(comm, strategy.measures()))
    if comm.size == 1 and name == "local":
        assert figures == {"period": 4}
    else:
        assert figures["model_distance"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert "model_distance" not in strategy.figures(summed(comm, strategy.measures()))


def test_the_distance_on_a_quadratic(comm: Communicator) -> None:
    """f_i(x) = (x - i)² / 2 from 0: after k steps x_i = i (1 - (1 - η)^k), so the distance is known."""
    for codec, method, fragments in (
        ("none", Local(), 1),
        ("bf16", Local(), 1),
        ("none", Elastic(comm.size), 1),
        ("none", DiLoCo(), 2),
    ):
        model = nn.Module()
        model.a, model.b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
        strategy = anchored(
            comm,
            method,
            3,
            OptimizerOptions(lr=0.5, momentum=0.0),
            model,
            CompressionOptions(codec),
            fragments=fragments,
        )

        def loss(module: Any) -> Tensor:
            return ((module.a - comm.rank) ** 2).sum() / 2 + ((module.b - comm.rank) ** 2).sum() / 2

        for _ in range(3):
            strategy.step(Share([loss], 1, comm.size))
        figures = strategy.figures(summed(comm, strategy.measures()))
        spread = math.sqrt(sum((rank - (comm.size - 1) / 2) ** 2 for rank in range(comm.size)) / comm.size)
        # Elastic averaging sends what there was before the last step; of two fragments one went after one step.
        moved = [1 - 0.5**2] * 2 if method.early else [1 - 0.5 ** (1 if fragments == 2 else 3), 1 - 0.5**3]
        expected = spread * math.sqrt(2 * sum(each**2 for each in moved))
        if comm.size > 1:
            assert figures["model_distance"] == pytest.approx(expected, rel=1e-2 if codec == "bf16" else 1e-5)


def summed(comm: Communicator, measures: dict[str, float]) -> dict[str, float]:
    views = all_gather_object(comm, measures)
    return {name: sum(view[name] for view in views) for name in measures}
