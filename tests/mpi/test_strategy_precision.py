"""Loss scaling: it changes no bit where nothing overflows; where something does, ranks skip together, or alone."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import ConfigError, NonFiniteError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.options import StrategyOptions
from tests.mpi.test_strategies import assert_same, mini_batch, network, part_of, strategy_on

# Forward passes are in float32 here, so that scaled and unscaled courses can be compared.
WAYS = [("sync", False), ("sync", True), ("local", False)]


def strategy_of(
    comm: Communicator,
    way: tuple[str, bool],
    precision: str,
    optimizer: OptimizerOptions | None = None,
    compression: str = "none",
) -> Strategy:
    name, shard = way
    codec = CompressionOptions(compression) if compression == "none" else CompressionOptions(compression, True)
    return strategy_on(
        comm,
        network(torch.float32),
        StrategyOptions(strategy=name, period=2),
        optimizer or OptimizerOptions(lr=0.1, momentum=0.9),
        GradientOptions(shard_optimizer=shard),
        precision=precision,
        compression=codec,
    )


def take(strategy: Strategy, steps: list[int], count: int = 12, rounds: int = 1, bad: int | None = None) -> None:
    """Take the mini-batches of these numbers; in number `bad` the last rank's loss is infinite."""
    comm = strategy.comm
    for step in steps:
        share = part_of(mini_batch(step, count, torch.float32), comm.rank, comm.size, rounds)
        if step == bad and comm.rank == comm.size - 1:
            share = Share([infinite(loss) for loss in share.losses], share.samples, share.global_samples)
        strategy.step(share)


def infinite(loss: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    return lambda model: loss(model) * math.inf


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("count", "rounds"), [(1, 1), (13, 1), (13, 2)])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(
    comm: Communicator, way: tuple[str, bool], optimizer: str, count: int, rounds: int
) -> None:
    options = OptimizerOptions(optimizer=optimizer, lr=0.01)
    hashes = []
    for precision in ("fp32", "fp16"):
        strategy = strategy_of(comm, way, precision, options)
        take(strategy, list(range(10)), count, rounds)
        strategy.finish()
        hashes.append(parameters_sha256(strategy.model))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("way", WAYS)
def test_clipping_is_by_the_norm_without_the_scale(comm: Communicator, way: tuple[str, bool]) -> None:
    options = OptimizerOptions(lr=0.1, clip_norm=0.05)
    courses = []
    for precision in ("fp32", "fp16"):
        strategy = strategy_of(comm, way, precision, options)
        take(strategy, list(range(6)))
        courses.append(strategy.model)
    assert_same(courses[1], courses[0], rtol=1e-4, atol=1e-6)
    unclipped = strategy_of(comm, way, "fp16", OptimizerOptions(lr=0.1))
    take(unclipped, list(range(6)))
    with pytest.raises(AssertionError):
        assert_same(courses[1], unclipped.model, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shard", "compression"), [(False, "none"), (True, "none"), (False, "top-k"), (True, "top-k"), (False, "sign")]
)
def test_an_overflow_on_one_rank_skips_the_step_on_all_without_a_trace(
    comm: Communicator, shard: bool, compression: str
) -> None:
    options = OptimizerOptions(optimizer="adam", lr=0.01)
    plain = strategy_of(comm, ("sync", shard), "fp32", options, compression)
    take(plain, [0, 1, 3, 4])
    scaled = strategy_of(comm, ("sync", shard), "fp16", options, compression)
    assert scaled.scaling is not None
    take(scaled, [0, 1])
    before = parameters_sha256(scaled.model)
    take(scaled, [2], bad=2)
    assert parameters_sha256(scaled.model) == before
    assert scaled.scaling.scale == 2.0**15
    # Also with half the scale: what codecs keep was halved too.
    take(scaled, [3, 4])
    assert parameters_sha256(scaled.model) == parameters_sha256(plain.model)
    assert (scaled.scaling.skipped_steps, scaled.skipped_steps()) == (1, 1)
    assert plain.skipped_steps() == 0


def test_ranks_of_local_sgd_skip_by_themselves(comm: Communicator) -> None:
    strategy = strategy_of(comm, ("local", False), "fp16")
    assert strategy.scaling is not None
    start = parameters_sha256(strategy.model)
    take(strategy, [0], bad=0)
    last = comm.rank == comm.size - 1
    assert (parameters_sha256(strategy.model) == start) == last
    assert strategy.scaling.skipped_steps == int(last)
    assert strategy.skipped_steps() == 1
    take(strategy, [1])
    assert len(set(all_gather_object(comm, parameters_sha256(strategy.model)))) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_goes_on_from_its_state(comm: Communicator, way: tuple[str, bool]) -> None:
    whole = strategy_of(comm, way, "fp16")
    take(whole, [0, 1, 2], bad=1)
    assert whole.scaling is not None
    state = copy.deepcopy(whole.scaling.state_dict())
    resumed = strategy_of(comm, way, "fp16")
    assert resumed.scaling is not None
    resumed.scaling.load_state_dict(state)
    assert resumed.scaling.scale == whole.scaling.scale
    assert resumed.skipped_steps() == whole.skipped_steps() == 1


def test_a_loss_that_no_scale_makes_finite_ends_the_run(comm: Communicator) -> None:
    strategy = strategy_of(comm, ("sync", False), "fp16")
    with pytest.raises(NonFiniteError, match=r"scaled by only 6\.10352e-05: float16 is not the cause; --precision"):
        take(strategy, [0] * 100, bad=0)
    assert strategy.skipped_steps() == 31


def test_an_optimizer_with_a_line_search_is_refused(comm: Communicator) -> None:
    with pytest.raises(ConfigError, match="--precision fp16: LBFGS evaluates the loss several times a step"):
        strategy_of(comm, ("sync", False), "fp16", OptimizerOptions(optimizer="lbfgs"))
