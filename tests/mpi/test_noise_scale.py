"""The gradient noise scale: against its formula, against known noise, and what is refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.compression.build import build_codec
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.noise_scale import NoiseScale
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.synchronous import Synchronous
from tests.mpi.test_strategies import mini_batch, network, part_of

SMALL_BUCKETS = GradientOptions(bucket_mb=2e-4, first_bucket_mb=1e-4)


def measuring(
    comm: Communicator,
    model: nn.Module,
    options: OptimizerOptions | None = None,
    every: int = 1,
    gradients: GradientOptions = SMALL_BUCKETS,
    **more: Any,
) -> Synchronous:
    if comm.size == 1:
        pytest.skip("compares the gradients of ranks")
    given = options or OptimizerOptions(lr=0.1, momentum=0.9, clip_norm=0.1, weight_decay=0.1)

    def make(groups: Any) -> torch.optim.Optimizer:
        return build_optimizer(given, groups)

    return Synchronous(model, make, comm, given.clip_norm, gradients, noise_every=every, **more)


def logged(strategy: Synchronous) -> dict[str, Any]:
    """What a logged step does: the sums of all ranks' measures, and the figures."""
    sums = strategy.measures()
    totals = {name: sum(each[name] for each in all_gather_object(strategy.comm, sums)) for name in sums}
    return strategy.figures(totals)


@pytest.mark.parametrize("kind", ["plain", "sharded", "fp16", "accumulated"])
def test_figures_are_the_formula_on_gathered_gradients(comm: Communicator, kind: str) -> None:
    scaling = LossScaling(torch.device("cpu")) if kind == "fp16" else None
    strategy = measuring(comm, network(), shard=kind == "sharded", scaling=scaling)
    p, b = comm.size, 6
    batch = mini_batch(0, p * b)
    model, gradients = network(), []
    for rank in range(p):
        loss = part_of(batch, rank, p).losses[0](model)
        pieces = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([piece.flatten() for piece in pieces]))
    m = torch.stack([each.square().sum() for each in gradients]).mean()
    q = torch.stack(gradients).mean(0).square().sum()
    trace, square = float(b * p / (p - 1) * (m - q)), float((p * q - m) / (p - 1))
    strategy.step(part_of(batch, comm.rank, p, rounds=3 if kind == "accumulated" else 1))
    figures = logged(strategy)
    assert figures["gradient_noise_trace"] == pytest.approx(trace)
    assert figures["gradient_square"] == pytest.approx(square)
    expected = trace / square if square > 0 else None
    assert figures["gradient_noise_scale"] == (None if expected is None else pytest.approx(expected))
    scale = strategy.summary()["noise_scale"]
    assert strategy.summary()["recommended_batch_size"] == (None if scale is None else max(1, round(scale)))


def test_measuring_changes_nothing_and_happens_every_so_many_steps(comm: Communicator) -> None:
    models, counts = [], []
    for every in (1, 3, 100):
        strategy = measuring(comm, network(), every=every)
        for step in range(7):
            strategy.step(part_of(mini_batch(step, 4 * comm.size), comm.rank, comm.size))
        counts.append(round(comm.size * strategy.measures()["noise_measurements"]))
        models.append(parameters_sha256(strategy.model))
    assert counts == [7, 2, 0]
    assert len(set(models)) == 1


def test_unequal_shares_are_left_out(comm: Communicator) -> None:
    strategy = measuring(comm, network())
    strategy.step(part_of(mini_batch(0, 4 * comm.size + 1), comm.rank, comm.size))
    assert strategy.measures()["noise_measurements"] == 0
    assert logged(strategy)["gradient_noise_scale"] is None
    assert strategy.summary() == {"noise_scale": None, "recommended_batch_size": None}


def test_known_noise_is_estimated_within_its_standard_error(comm: Communicator) -> None:
    """Gradients G + noise of N(0, sigma^2 I) per sample: tr Sigma = d sigma^2, and B = d sigma^2 / |G|^2."""
    d, b, sigma, steps = 2000, 4, 0.5, 30
    p = comm.size
    model = nn.Linear(d, 1, bias=False, dtype=torch.float64)
    true_gradient = torch.full((1, d), 0.05, dtype=torch.float64)
    generator = torch.Generator().manual_seed(17 + comm.rank)

    def loss(model: nn.Module) -> Tensor:
        # The gradient of a linear model's output is its input.
        noise = sigma * torch.randn(b, d, generator=generator, dtype=torch.float64)
        return model(true_gradient + noise).mean()

    strategy = measuring(comm, model, OptimizerOptions(lr=0.0001, momentum=0.0))
    for _ in range(steps):
        strategy.step(Share([loss], b, b * p))
    figures = logged(strategy)
    trace, square = d * sigma**2, float(true_gradient.square().sum())
    # tr Sigma: a chi-square of d (p - 1) degrees of freedom a step; |G|^2: q has the variance 4 G' S G + 2 tr S^2 with
    # S = Sigma / bp, and there is that of m - q.
    trace_error = trace * math.sqrt(2 / (d * (p - 1) * steps))
    variance = sigma**2 / (b * p)
    q_variance = 4 * square * variance + 2 * d * variance**2
    square_error = math.sqrt((q_variance + (trace_error / (b * p)) ** 2 * steps) / steps)
    assert figures["gradient_noise_trace"] == pytest.approx(trace, abs=4 * trace_error)
    assert figures["gradient_square"] == pytest.approx(square, abs=4 * square_error)
    error = trace / square * (trace_error / trace + square_error / square)
    assert figures["gradient_noise_scale"] == pytest.approx(trace / square, abs=4 * error)


def test_averages_are_of_the_parts_not_of_ratios() -> None:
    scale = NoiseScale(2)
    scale.update({"gradient_noise_trace": 2.0, "gradient_square": -1.0, "noise_measurements": 1.0})
    assert scale.value is None
    scale.update({"gradient_noise_trace": 8.0, "gradient_square": 6.0, "noise_measurements": 2.0})
    # Nearly equal weights, the older one's a little less.
    kept = 0.99
    weights = [(1 - kept) * kept**2, 1 - kept**2]
    trace = (weights[0] * 2.0 + weights[1] * 4.0) / sum(weights)
    square = (weights[0] * -1.0 + weights[1] * 3.0) / sum(weights)
    assert scale.trace == pytest.approx(trace)
    assert scale.square == pytest.approx(square)
    assert scale.value == pytest.approx(trace / square)
    scale.update({"gradient_noise_trace": math.nan, "gradient_square": 6.0, "noise_measurements": 1.0})
    assert scale.value == pytest.approx(trace / square)
    again = NoiseScale(2)
    again.load_state_dict(scale.state_dict())
    assert again.value == scale.value


def test_what_cannot_be_measured_is_refused(comm: Communicator) -> None:
    codec = build_codec(CompressionOptions("bf16"), seed=0, rank=comm.rank, size=comm.size)
    for more, match in [
        ({"compression": codec}, "needs exact sums of gradients; leave out --compression"),
        ({"gradients": GradientOptions(sync_batch_norm=True)}, "leave out --sync-batch-norm"),
        ({"options": OptimizerOptions(optimizer="lbfgs")}, "LBFGS computes several gradients a step"),
    ]:
        with pytest.raises(ConfigError, match=f"--noise-scale 5: .*{match}"):
            measuring(comm, network(), every=5, **more)  # type: ignore[arg-type]


def test_one_rank_alone_is_refused(comm: Communicator) -> None:
    if comm.size > 1:
        pytest.skip("has other ranks")
    with pytest.raises(ConfigError, match="--noise-scale 5: compares the gradients of ranks, and there is only one"):
        Synchronous(network(), lambda groups: torch.optim.SGD(groups, lr=0.1), comm, None, SMALL_BUCKETS, noise_every=5)
