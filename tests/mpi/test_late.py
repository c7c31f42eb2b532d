"""Delayed SGD and distributed mini-batches against serial loops, and synchronous SGD's resynchronisation."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd import convert_sync_batchnorm
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.compression.build import build_codec
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import ConfigError, NonFiniteError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.gradients.sync_batch_norm import close_sync_batchnorm
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.adasum import Adasum
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.delayed import Delayed
from allreduce_sgd.strategies.dmb import DistributedMiniBatch
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.synchronous import Synchronous
from tests.mpi.test_strategies import assert_same, mini_batch, network, part_of, train

SMALL_BUCKETS = GradientOptions(bucket_mb=2e-4, first_bucket_mb=1e-4)
MOMENTUM = OptimizerOptions(lr=0.1, momentum=0.9)
ADAM = OptimizerOptions(optimizer="adam", lr=0.01)


def delayed(
    comm: Communicator,
    delay: int,
    options: OptimizerOptions = MOMENTUM,
    model: nn.Module | None = None,
    gradients: GradientOptions = SMALL_BUCKETS,
    compression: CompressionOptions | None = None,
    scaling: LossScaling | None = None,
    resync_every: int | None = None,
) -> Delayed:
    model = network() if model is None else model
    codec = None
    if compression is not None:
        codec = build_codec(compression, seed=3, rank=comm.rank, size=comm.size)
    optimizer = build_optimizer(options, model.parameters())
    return Delayed(model, optimizer, comm, options.clip_norm, gradients, delay, codec, scaling, resync_every)


def dmb(comm: Communicator, options: OptimizerOptions = MOMENTUM, model: nn.Module | None = None) -> Strategy:
    model = network() if model is None else model
    optimizer = build_optimizer(options, model.parameters())
    return DistributedMiniBatch(model, optimizer, comm, options.clip_norm, SMALL_BUCKETS)


def sync(comm: Communicator, options: OptimizerOptions = MOMENTUM, **more: Any) -> Strategy:
    def make(groups: Any) -> torch.optim.Optimizer:
        return build_optimizer(options, groups)

    return Synchronous(network(), make, comm, options.clip_norm, SMALL_BUCKETS, **more)


def serial(delay: int, options: OptimizerOptions, steps: int, count: int) -> nn.Module:
    """w_{t+1} = w_t - eta g(w_{t - delay}), and the outstanding gradients at the end."""
    model = network()
    optimizer = build_optimizer(options, model.parameters())
    queue: list[list[Tensor]] = []

    def apply() -> None:
        for parameter, gradient in zip(model.parameters(), queue.pop(0), strict=True):
            parameter.grad = gradient
        if options.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()

    for step in range(steps):
        inputs, targets = mini_batch(step, count)
        loss = functional.cross_entropy(model(inputs), targets)
        queue.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        if len(queue) > delay:
            apply()
    while queue:
        apply()
    return model


def assert_agreed(comm: Communicator, model: nn.Module) -> None:
    assert len(set(all_gather_object(comm, parameters_sha256(model)))) == 1


# ---- delayed


@pytest.mark.parametrize("options", [OptimizerOptions(lr=0.1, clip_norm=0.3), ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("delay", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 7])
def test_delayed_is_the_serial_recursion(comm: Communicator, delay: int, options: OptimizerOptions, count: int) -> None:
    strategy = delayed(comm, delay, options)
    train(strategy, comm, 10, count, rounds=2)
    strategy.finish()
    assert_same(strategy.model, serial(delay, options, 10, count))
    assert_agreed(comm, strategy.model)


def test_without_a_delay_it_is_sync(comm: Communicator) -> None:
    count = 2 * comm.size + 1
    assert_same(train(delayed(comm, 0), comm, 20, count), train(sync(comm), comm, 20, count), rtol=1e-12, atol=1e-13)


def test_the_first_steps_apply_nothing(comm: Communicator) -> None:
    strategy = delayed(comm, 2)
    before = parameters_sha256(strategy.model)
    for step in range(3):
        assert parameters_sha256(strategy.model) == before
        strategy.step(part_of(mini_batch(step, 6), comm.rank, comm.size))
    assert parameters_sha256(strategy.model) != before


class Spy:
    """A communicator that notes when all-reduces start and when they are waited for."""

    def __init__(self, comm: Communicator, events: list[str]) -> None:
        self._comm, self._events, self.sums = comm, events, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_reduce(self, *arguments: Any, **named: Any) -> Any:
        number, work = self.sums, self._comm.all_reduce(*arguments, **named)
        self.sums += 1
        self._events.append(f"start {number}")
        spy = self

        class Noted:
            def wait(self, timeout: float | None = None) -> Tensor:
                spy._events.append(f"wait {number}")
                return work.wait(timeout)

            def done(self) -> bool:
                return work.done()

        return Noted()


def test_a_sum_is_in_flight_while_the_next_gradients_are_computed(comm: Communicator) -> None:
    events: list[str] = []
    spy: Any = Spy(comm, events)
    strategy = delayed(spy, 2, gradients=GradientOptions())
    events.clear()
    spy.sums = 0
    for step in range(4):

        def loss(model: nn.Module, step: int = step) -> Tensor:
            events.append(f"gradient {step}")
            return model(mini_batch(step, 4)[0]).square().mean()

        strategy.step(Share([loss], 4, 4 * comm.size))
    assert events == [
        *["gradient 0", "start 0", "gradient 1", "start 1", "gradient 2", "start 2", "wait 0"],
        *["gradient 3", "start 3", "wait 1"],
    ]
    strategy.finish()


@pytest.mark.parametrize("delay", [0, 2])
def test_consensus_is_what_finish_leaves_and_has_no_trace(comm: Communicator, delay: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    strategy, other = delayed(comm, delay, model=model), delayed(comm, delay, model=twin)
    count = 4 * comm.size
    train(strategy, comm, 5, count)
    train(other, comm, 5, count)
    before = parameters_sha256(model)
    with strategy.consensus():
        assert_agreed(comm, model)
        agreed = parameters_sha256(model)
    assert parameters_sha256(model) == before
    for each in (strategy, other):
        train(each, comm, 3, count)
    assert parameters_sha256(model) == parameters_sha256(twin)
    with strategy.consensus():
        agreed = parameters_sha256(model)
    strategy.finish()
    assert parameters_sha256(model) == agreed


@pytest.mark.parametrize("codec", [None, "sign", "powersgd", "top-k", "dgc"])
def test_delayed_goes_on_from_its_state_bit_for_bit(comm: Communicator, codec: str | None) -> None:
    compression = None if codec is None else CompressionOptions(codec)

    def make() -> Delayed:
        return delayed(
            comm, 2, OptimizerOptions(lr=0.05, momentum=0.5), network(torch.float32), compression=compression
        )

    whole = make()
    train(whole, comm, 5, 12)
    # As the trainer does: the model of a checkpoint is the consensus.
    with whole.consensus():
        model = copy.deepcopy(whole.model.state_dict())
    state = copy.deepcopy((whole.state_dict(), whole.optimizer.state_dict()))
    train(whole, comm, 5, 12)
    resumed = make()
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(state[1])
    resumed.load_state_dict(state[0])
    train(resumed, comm, 5, 12)
    for each in (whole, resumed):
        each.finish()
    assert parameters_sha256(resumed.model) == parameters_sha256(whole.model)
    assert_agreed(comm, whole.model)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_sending_every_element_is_no_compression(comm: Communicator, delay: int) -> None:
    exact = train(delayed(comm, delay), comm, 10, 12)
    everything = CompressionOptions("top-k", compression_ratio=1.0)
    assert_same(train(delayed(comm, delay, compression=everything), comm, 10, 12), exact)


@pytest.mark.parametrize("overflows", [(3,), (3, 4)])
def test_an_overflow_spoils_only_its_own_gradient(comm: Communicator, overflows: tuple[int, ...]) -> None:
    """The scale halves once, and gradients that were under way with the old scale count in full."""
    delay = 2
    scaled = delayed(comm, delay, scaling=LossScaling(torch.device("cpu")))
    plain = delayed(comm, delay)
    scaling = scaled.scaling
    assert scaling is not None
    before = scaling.scale
    for step in range(9):
        share = part_of(mini_batch(step, 4 * comm.size), comm.rank, comm.size)
        plain.step(share)
        if step in overflows:

            def overflow(model: nn.Module, compute: Callable[[nn.Module], Tensor] = share.losses[0]) -> Tensor:
                return compute(model) * (float("inf") if comm.rank == comm.size - 1 else 1.0)

            share = Share([overflow], share.samples, share.global_samples)
        scaled.step(share)
        if step - delay in overflows:
            # The plain one has applied it, and is set back.
            plain.model.load_state_dict(scaled.model.state_dict())
            plain.optimizer.load_state_dict(copy.deepcopy(scaled.optimizer.state_dict()))
    for each in (scaled, plain):
        each.finish()
    assert (scaling.scale, scaling.skipped_steps) == (before / 2, len(overflows))
    assert_agreed(comm, scaled.model)
    assert all(torch.isfinite(parameter).all() for parameter in scaled.model.parameters())
    assert_same(scaled.model, plain.model, rtol=1e-12, atol=1e-14)


def test_what_a_codec_keeps_follows_the_loss_scale(comm: Communicator) -> None:
    """Top-k selects the same elements on any scale, so that with powers of two the course is that without scaling."""
    compression = CompressionOptions("top-k", compression_ratio=0.25)
    scaled = delayed(comm, 2, compression=compression, scaling=LossScaling(torch.device("cpu")))
    plain = delayed(comm, 2, compression=compression)
    assert scaled.scaling is not None
    for step in range(9):
        if step in (3, 6):
            scaled.scaling._scaler.update(scaled.scaling.scale * (0.25 if step == 3 else 2.0))
        for each in (scaled, plain):
            each.step(part_of(mini_batch(step, 12), comm.rank, comm.size))
    for each in (scaled, plain):
        each.finish()
    assert_same(scaled.model, plain.model, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", ["average", "broadcast"])
def test_buffers_agree_before_every_step(comm: Communicator, how: str) -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    strategy = delayed(comm, 1, model=model, gradients=GradientOptions(buffers=how))
    for step in range(3):
        own = part_of(mini_batch(step, 4 * comm.size), comm.rank, comm.size)

        def loss(model: Any, compute: Callable[[nn.Module], Tensor] = own.losses[0]) -> Tensor:
            seen = all_gather_object(comm, model[0].running_mean.tolist())
            assert all(theirs == seen[0] for theirs in seen)
            return compute(model)

        strategy.step(Share([loss], own.samples, own.global_samples))
    seen = all_gather_object(comm, model[0].running_mean.tolist())
    assert comm.size == 1 or seen[0] != seen[1]
    strategy.finish()


def test_synchronised_batch_norm_equals_sync(comm: Communicator) -> None:
    gradients = GradientOptions(sync_batch_norm=True)
    models = []
    for kind in ("sync", "delayed"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        convert_sync_batchnorm(model, comm)
        if kind == "delayed":
            strategy: Strategy = delayed(comm, 0, model=model, gradients=gradients)
        else:
            strategy = Synchronous(model, lambda given: build_optimizer(MOMENTUM, given), comm, None, gradients)
        models.append(train(strategy, comm, 5, 3 * comm.size + 1))
        close_sync_batchnorm(model)
    assert_same(models[1], models[0], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_a_schedule_does_not_warn_of_steps_that_apply_nothing(comm: Communicator) -> None:
    strategy = delayed(comm, 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(strategy.optimizer, lambda step: 0.9**step)
    for step in range(4):
        strategy.step(part_of(mini_batch(step, 6), comm.rank, comm.size))
        schedule.step()
    strategy.finish()


class Branches(nn.Module):
    """Of three layers only those named are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(5, 1, bias=False) for _ in range(3))

    def forward(self, inputs: Tensor, used: tuple[int, ...]) -> Tensor:
        total: Tensor = sum((self.layers[index](inputs).mean() for index in used), torch.zeros(()))
        return total


@pytest.mark.parametrize("ride", [True, False])
def test_unused_parameters_are_left_alone_unless_some_rank_used_them(comm: Communicator, ride: bool) -> None:
    model = Branches()
    before = [weight.detach().clone() for weight in model.parameters()]
    options = OptimizerOptions(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.5)
    codec = None if ride else CompressionOptions("top-k", compression_ratio=1.0)
    strategy = delayed(comm, 1, options, model, compression=codec)
    inputs = torch.ones(2, 5)
    used = (0, 1) if comm.rank == 0 else (0,)
    for _ in range(2):
        strategy.step(Share([lambda model: model(inputs, used)], 2, 2 * comm.size))
    after = [weight.detach() for weight in model.parameters()]
    ones = torch.ones(1, 5)
    torch.testing.assert_close(after[0], before[0] * 0.95 - 0.1 * ones)
    torch.testing.assert_close(after[1], before[1] * 0.95 - 0.1 / comm.size * ones)
    assert torch.equal(after[2], before[2])
    strategy.finish()


def test_a_missing_gradient_is_an_error_where_asked(comm: Communicator) -> None:
    strategy = delayed(comm, 1, model=Branches(), gradients=GradientOptions(find_unused_parameters=False))
    with pytest.raises(RuntimeError, match=r"got no gradient in this step: layers\.1\.weight, layers\.2\.weight"):
        strategy.step(Share([lambda model: model(torch.ones(2, 5), (0,))], 2, 2 * comm.size))


def test_a_nan_is_told_with_its_rank(comm: Communicator) -> None:
    strategy = delayed(comm, 1, gradients=GradientOptions(check_finite=True))
    bad = comm.size - 1
    factor = float("nan") if comm.rank == bad else 1.0
    share = Share([lambda model: model(torch.ones(2, 5, dtype=torch.float64)).sum() * factor], 2, 2 * comm.size)
    strategy.step(share)
    with pytest.raises(NonFiniteError, match=rf"NaN or Inf in the gradient of rank {bad}: "):
        strategy.step(share)


def test_what_evaluates_the_loss_itself_is_refused(comm: Communicator) -> None:
    with pytest.raises(ConfigError, match="--optimizer LBFGS: evaluates the loss several times a step"):
        delayed(comm, 1, OptimizerOptions(optimizer="lbfgs"))


def test_a_checkpoint_with_more_outstanding_is_refused(comm: Communicator) -> None:
    strategy = delayed(comm, 2)
    train(strategy, comm, 3, 6)
    state = strategy.state_dict()
    with pytest.raises(ConfigError, match="--delay 1: the checkpoint has 2 sums outstanding"):
        delayed(comm, 1).load_state_dict(state)


# ---- distributed mini-batches


@pytest.mark.parametrize("options", [OptimizerOptions(lr=0.1, clip_norm=0.3), ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("count", [1, 9])
def test_dmb_learns_what_sync_learns(comm: Communicator, options: OptimizerOptions, count: int) -> None:
    strategy, predicted = dmb(comm, options), []

    def predict(model: nn.Module) -> Tensor:
        predicted.append((model.training, torch.is_grad_enabled()))
        return model(mini_batch(0, 2)[0]).sum()

    for step in range(10):
        own = part_of(mini_batch(step, count), comm.rank, comm.size)
        strategy.step(Share(own.losses, own.samples, own.global_samples, [predict, predict]))
    expected = train(sync(comm, options), comm, 10, count)
    assert_same(strategy.model, expected, rtol=1e-12, atol=1e-13)
    assert predicted == 20 * [(False, False)]
    assert strategy.model.training
    assert_agreed(comm, strategy.model)


def test_predictions_use_the_old_parameters_and_leave_statistics_alone(comm: Communicator) -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    model[0].eval()
    strategy = dmb(comm, model=model)
    seen: list[str] = []
    before = parameters_sha256(model)
    own = part_of(mini_batch(0, 4 * comm.size), comm.rank, comm.size)

    def predict(model: nn.Module) -> Tensor:
        seen.append(parameters_sha256(model))
        return model(torch.randn(3, 5, dtype=torch.float64)).sum()

    strategy.step(Share(own.losses, own.samples, own.global_samples, [predict]))
    assert seen == [before]
    assert parameters_sha256(model) != before
    assert [module.training for module in model] == [False, True]
    assert torch.equal(model[0].running_mean, torch.zeros(5, dtype=torch.float64))


# ---- resynchronisation


def adasum(comm: Communicator, resync_every: int) -> Strategy:
    def make(groups: Any) -> torch.optim.Optimizer:
        return build_optimizer(MOMENTUM, groups)

    return Adasum(network(), make, comm, None, SMALL_BUCKETS, None, resync_every)


@pytest.mark.parametrize("kind", ["sync", "sharded", "delayed", "dmb", "adasum"])
def test_resync_heals_a_drift_every_so_many_steps(comm: Communicator, kind: str) -> None:
    if kind in ("sync", "sharded"):
        strategy = sync(comm, shard=kind == "sharded", resync_every=3)
    elif kind == "adasum":
        strategy = adasum(comm, 3)
    elif kind == "delayed":
        strategy = delayed(comm, 1, resync_every=3)
    else:
        model = network()
        optimizer = build_optimizer(MOMENTUM, model.parameters())
        strategy = DistributedMiniBatch(model, optimizer, comm, None, SMALL_BUCKETS, resync_every=3)
    if kind != "sharded":
        with torch.no_grad():
            for parameter in strategy.model.parameters():
                parameter.mul_(1 + 1e-7 * comm.rank)
    for step in range(7):
        drifted = len(set(all_gather_object(comm, parameters_sha256(strategy.model))))
        assert drifted == (comm.size if step < 3 and kind != "sharded" else 1)
        strategy.step(part_of(mini_batch(step, 4 * comm.size), comm.rank, comm.size))
