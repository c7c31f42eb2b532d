"""Gossip against its mixing matrices: the whole course of all ranks, simulated serially."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.errors import ConfigError, NonFiniteError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.gossip import Gossip
from tests.mpi.test_strategies import mini_batch, network, part_of, train

BUCKETS = GradientOptions(bucket_mb=2e-4)
KINDS = ["average", "push-sum"]


def gossip(
    comm: Communicator,
    kind: str,
    delay: int = 0,
    model: nn.Module | None = None,
    lr: float = 0.1,
    momentum: float = 0.0,
) -> Gossip:
    model = network() if model is None else model
    options = OptimizerOptions(lr=0.1, momentum=momentum)
    optimizer = build_optimizer(options, model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = lr
    return Gossip(model, optimizer, comm, None, BUCKETS, kind, delay)


def mixing(kind: str, size: int) -> Tensor:
    """The matrix W of one mixing: x_i <- sum over j of W_ij x_j."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for rank in range(size):
        if kind == "push-sum":
            matrix[rank, rank] += 0.5
            matrix[rank, (rank - 1) % size] += 0.5
        else:
            near = {rank, (rank - 1) % size, (rank + 1) % size}
            for other in near:
                matrix[rank, other] = 1 / len(near)
    return matrix


def everyones(comm: Communicator, model: nn.Module) -> Tensor:
    """All ranks' parameters: float64 of shape (ranks, parameters)."""
    own = nn.utils.parameters_to_vector(model.parameters()).detach().double().tolist()
    return torch.tensor(all_gather_object(comm, own), dtype=torch.float64)


def scatter_parameters(comm: Communicator, model: nn.Module) -> None:
    torch.manual_seed(comm.rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_from_the_mean_falls_as_the_second_eigenvalue_says(comm: Communicator, kind: str) -> None:
    strategy = gossip(comm, kind, lr=0.0)
    scatter_parameters(comm, strategy.model)
    before = everyones(comm, strategy.model)
    matrix = mixing(kind, comm.size)
    modes = torch.linalg.eigvals(matrix).abs().sort(descending=True).values
    second = float(modes[1]) if comm.size > 1 else 0.0
    formula = [abs(1 + 2 * math.cos(2 * math.pi * mode / comm.size)) / 3 for mode in range(1, comm.size)]
    if kind == "push-sum":
        assert second == pytest.approx(math.cos(math.pi / comm.size) if comm.size > 1 else 0.0, abs=1e-7)
    elif comm.size > 2:
        assert second == pytest.approx(max(formula), abs=1e-7)
    steps = 6
    train(strategy, comm, steps, 4 * comm.size)
    after = everyones(comm, strategy.model)
    torch.testing.assert_close(after.mean(0), before.mean(0))
    distances = [float((each - each.mean(0)).norm()) for each in (before, after)]
    # The matrices are normal, so the bound holds from the first step on.
    assert distances[1] <= distances[0] * second**steps * (1 + 1e-9) + 1e-12
    if comm.size == 4 and kind == "average":
        # All modes but the mean shrink alike there.
        assert distances[1] == pytest.approx(distances[0] / 3**steps, rel=1e-6)
    torch.testing.assert_close(after, torch.linalg.matrix_power(matrix, steps) @ before)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 9])
def test_the_course_is_that_of_the_definition(comm: Communicator, kind: str, delay: int, count: int) -> None:
    """All ranks' models are trained serially, with matrices instead of messages."""
    size, steps = comm.size, 7
    models = [network() for _ in range(size)]
    options = OptimizerOptions(lr=0.1, momentum=0.9)
    optimizers = [build_optimizer(options, model.parameters()) for model in models]
    matrix = mixing(kind, size)
    own, others = torch.diag(matrix.diag()), matrix - torch.diag(matrix.diag())
    weight = torch.ones(size, 1, dtype=torch.float64)
    flying: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        batch = mini_batch(step, count)
        shares = [part_of(batch, rank, size) for rank in range(size)]
        for rank, model in enumerate(models):
            optimizers[rank].zero_grad()
            if shares[rank].losses:
                shares[rank].losses[0](model).backward()
        z = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach() for model in models])
        flying.append((others @ (z * weight), others @ weight))
        arrived = flying.pop(0) if len(flying) > delay else (torch.zeros_like(z), torch.zeros_like(weight))
        weight_now = own @ weight + arrived[1]
        z = (own @ (z * weight) + arrived[0]) / weight_now
        if kind == "push-sum":
            weight = weight_now
        for rank, model in enumerate(models):
            nn.utils.vector_to_parameters(z[rank], model.parameters())
            if shares[rank].losses:
                optimizers[rank].step()
    strategy = gossip(comm, kind, delay, momentum=0.9)
    train(strategy, comm, steps, count)
    expected = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach() for model in models])
    torch.testing.assert_close(everyones(comm, strategy.model), expected)
    if size > 1:
        scaled = expected * weight
        with strategy.consensus():
            torch.testing.assert_close(everyones(comm, strategy.model)[0], scaled.sum(0) / weight.sum())
    strategy.finish()


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_over_every_back_end_with_messages(any_comm: Communicator, kind: str, delay: int) -> None:
    if any_comm.size > 1 and any_comm.backend == "nccl":
        with pytest.raises(ConfigError, match="--strategy gossip: back end nccl has no messages between two ranks"):
            gossip(any_comm, kind, delay)
        return
    strategy = gossip(any_comm, kind, delay, lr=0.0)
    scatter_parameters(any_comm, strategy.model)
    before = everyones(any_comm, strategy.model)
    train(strategy, any_comm, 5 + delay, any_comm.size)
    after = everyones(any_comm, strategy.model)
    if delay == 0:
        torch.testing.assert_close(after, torch.linalg.matrix_power(mixing(kind, any_comm.size), 5) @ before)
    assert float((after - after.mean(0)).norm()) <= 0.5 * float((before - before.mean(0)).norm())
    strategy.finish()


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_only_neighbours_get_messages_of_the_size_told(comm: Communicator, kind: str, delay: int) -> None:
    strategy = gossip(comm, kind, delay)
    parameters_bytes = sum(parameter.nbytes for parameter in strategy.model.parameters())
    before = comm.traffic.bytes_sent or 0
    train(strategy, comm, 3, 4 * comm.size)
    # Waits for what is under way.
    strategy.state_dict()
    sent_bytes = (comm.traffic.bytes_sent or 0) - before
    neighbours = 0 if comm.size == 1 else 1 if kind == "push-sum" or comm.size == 2 else 2
    # Push-sum's weight has 8 bytes.
    assert sent_bytes == 3 * neighbours * (parameters_bytes + (8 if kind == "push-sum" else 0))
    strategy.finish()


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_gossip_goes_on_from_its_state_bit_for_bit(comm: Communicator, kind: str, delay: int) -> None:
    whole = gossip(comm, kind, delay, momentum=0.9)
    train(whole, comm, 4, 4 * comm.size)
    state = copy.deepcopy((whole.model.state_dict(), whole.state_dict()))
    train(whole, comm, 4, 4 * comm.size)
    resumed = gossip(comm, kind, delay, momentum=0.9)
    resumed.model.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(resumed, comm, 4, 4 * comm.size)
    assert parameters_sha256(resumed.model) == parameters_sha256(whole.model)
    for each in (whole, resumed):
        each.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_the_consensus_is_agreed_and_leaves_no_trace(comm: Communicator, kind: str) -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    strategy = gossip(comm, kind, 1, model)
    train(strategy, comm, 4, 4 * comm.size)
    before = parameters_sha256(model)
    with strategy.consensus():
        agreed = parameters_sha256(model)
        assert len(set(all_gather_object(comm, agreed))) == 1
    assert parameters_sha256(model) == before
    strategy.finish()
    assert parameters_sha256(model) == agreed


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_different_minima_come_near_the_common_one(comm: Communicator, kind: str, delay: int) -> None:
    """f_i(x) = (x - i)^2 / 2: the mean over ranks has its minimum at the mean of i."""
    model = nn.Linear(1, 1, bias=False)
    strategy = gossip(comm, kind, delay, model, lr=0.02)
    one = torch.ones(1)
    for _ in range(500):
        strategy.step(Share([lambda model: (model(one) - comm.rank).square().sum() / 2], 1, comm.size))
    strategy.finish()
    assert model.weight.item() == pytest.approx((comm.size - 1) / 2, abs=0.02 * comm.size)


def test_figures_tell_the_distance_between_neighbours(comm: Communicator) -> None:
    strategy = gossip(comm, "average", lr=0.0)
    scatter_parameters(comm, strategy.model)
    before = everyones(comm, strategy.model)
    train(strategy, comm, 1, comm.size)
    sums = strategy.measures()
    totals = {name: sum(each[name] for each in all_gather_object(comm, sums)) for name in sums}
    if comm.size == 1:
        assert strategy.figures(totals) == {}
        return
    firsts = [min((rank - 1) % comm.size, (rank + 1) % comm.size) for rank in range(comm.size)]
    expected = math.sqrt(float((before - before[firsts]).square().sum()) / comm.size)
    assert strategy.figures(totals)["neighbour_distance"] == pytest.approx(expected)


def test_what_cannot_be_is_refused(comm: Communicator) -> None:
    with pytest.raises(ConfigError, match="--delay 2: --strategy gossip can be 0 or 1 steps late"):
        gossip(comm, "average", 2)
    with pytest.raises(ConfigError, match="--optimizer LBFGS"):
        Gossip(network(), torch.optim.LBFGS(network().parameters()), comm, None, BUCKETS)


def test_a_nan_is_told_by_the_rank_that_has_it(comm: Communicator) -> None:
    model = network()
    optimizer = build_optimizer(OptimizerOptions(lr=0.1), model.parameters())
    strategy = Gossip(model, optimizer, comm, None, GradientOptions(check_finite=True))
    share = Share([lambda model: model(torch.ones(2, 5, dtype=torch.float64)).sum() * float("nan")], 2, 2 * comm.size)
    with pytest.raises(
        NonFiniteError, match=rf"NaN or Inf in the loss, the gradient of 0\.weight, .* of rank {comm.rank}"
    ):
        strategy.step(share)
    strategy.finish()
