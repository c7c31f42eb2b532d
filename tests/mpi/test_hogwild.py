"""Hogwild!: tickets, one memory for the parameters, and what it reaches, against serial SGD."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.shared_numbers import SharedNumbers
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.sampling import EpochSampler
from allreduce_sgd.data.split import Split
from allreduce_sgd.errors import ConfigError, NonFiniteError
from allreduce_sgd.gradients.clipping import clip_grad_norm_
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.models.sparse_logistic import SparseLogistic
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.hogwild import Hogwild, HogwildPace
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.pace import Ticket
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.topology import Topology
from tests.mpi.test_node_memory import made
from tests.mpi.test_strategies import assert_same, mini_batch, network, part_of, strategy_on

PLAIN = OptimizerOptions(momentum=0.0, lr=0.5)
SAMPLES, FEATURES = 2000, 100
NOTHING = (0.0,) * 5


def sparse_data() -> tuple[Split, Split]:
    options = DataOptions(dataset=f"synthetic-sparse:{SAMPLES},{FEATURES},2", density=0.05)
    dataset = load_dataset(options, seed=1)
    assert isinstance(dataset.train, Split)
    assert isinstance(dataset.test, Split)
    return dataset.train, dataset.test


def loss_of(model: nn.Module, samples: Split, indices: Tensor) -> Tensor:
    inputs, targets = samples.batch(indices)
    return functional.softplus(-(2 * targets - 1) * model(inputs).squeeze(1)).mean()


def mean_loss(model: nn.Module, samples: Split) -> float:
    with torch.no_grad():
        return float(loss_of(model, samples, torch.arange(len(samples))))


def hogwild(
    comm: Communicator,
    model: nn.Module,
    options: OptimizerOptions = PLAIN,
    gradients: GradientOptions | None = None,
    scaling: LossScaling | None = None,
) -> Hogwild:
    optimizer = build_optimizer(options, model.parameters())
    return Hogwild(model, optimizer, comm, options.clip_norm, gradients or GradientOptions(), scaling)


def run(
    strategy: Hogwild,
    first: int,
    until: int,
    share_of: Callable[[Ticket], Share],
    reports: Callable[[int], Sequence[float]] = lambda taken: NOTHING,
) -> tuple[list[Ticket], int]:
    """Train as the trainer does, and return this rank's tickets and the step at the end."""
    assert strategy.pace is not None
    strategy.pace.open(first, until)
    tickets: list[Ticket] = []
    while (ticket := strategy.pace.take(reports(len(tickets)))) is not None:
        tickets.append(ticket)
        strategy.step(share_of(ticket))
    return tickets, strategy.pace.close()


def shares_of(sampler: EpochSampler, samples: Split, parts: int) -> Callable[[Ticket], Share]:
    def share_of(ticket: Ticket) -> Share:
        epoch, position = divmod(ticket.step, sampler.steps_per_epoch)
        indices = sampler.indices(epoch, position, ticket.part, parts)
        losses = [lambda model: loss_of(model, samples, indices)] if len(indices) else []
        return Share(losses, len(indices), sampler.global_count(position))

    return share_of


def all_tickets(comm: Communicator, tickets: list[Ticket]) -> list[tuple[int, int]]:
    return sorted((step, part) for each in all_gather_object(comm, tickets) for step, part in each)


# ---- tickets


def test_every_sample_of_an_epoch_is_visited_exactly_once(comm: Communicator) -> None:
    pace = HogwildPace(comm)
    sampler = EpochSampler(211, 20, seed=3)
    first = 2 * sampler.steps_per_epoch
    pace.open(first, first + sampler.steps_per_epoch)
    seen: list[int] = []
    while (ticket := pace.take(NOTHING)) is not None:
        seen += sampler.indices(2, ticket.step - first, ticket.part, comm.size).tolist()
    assert pace.close() == first + sampler.steps_per_epoch
    assert sorted(index for each in all_gather_object(comm, seen) for index in each) == list(range(211))


def test_tickets_come_in_order_and_stretches_follow_one_another(comm: Communicator) -> None:
    pace = HogwildPace(comm)
    for first, until in ((0, 7), (7, 8), (8, 8), (8, 30)):
        pace.open(first, until)
        tickets = []
        while (ticket := pace.take(NOTHING)) is not None:
            tickets.append(ticket)
        assert tickets == sorted(tickets)
        assert pace.take(NOTHING) is None
        assert pace.close() == until
        everything = [(step, part) for step in range(first, until) for part in range(comm.size)]
        assert all_tickets(comm, tickets) == everything


def test_reports_are_summed_over_ranks_and_each_stretch_begins_anew(comm: Communicator) -> None:
    pace = HogwildPace(comm)
    for _ in range(2):
        pace.open(0, 5)
        taken = 0
        while pace.take((0.5, 1.0, comm.rank, taken, 0.0)) is not None:
            taken += 1
            # What came back with the ticket has this rank's own reports in it at least.
            assert pace.totals[1] >= taken
        pace.close()
        asked = 5 * comm.size + comm.size
        assert list(pace.totals[:2]) == [0.5 * asked, asked]
        counts = all_gather_object(comm, taken)
        assert pace.totals[2] == sum(rank * (count + 1) for rank, count in enumerate(counts))
        assert pace.totals[3] == sum(count * (count + 1) / 2 for count in counts)


def test_a_request_to_stop_ends_the_stretch_with_the_step_that_was_begun(comm: Communicator) -> None:
    strategy = hogwild(comm, network(), OptimizerOptions(momentum=0.0, lr=0.01))
    count = 3 * comm.size

    def share_of(ticket: Ticket) -> Share:
        return part_of(mini_batch(ticket.step, count), ticket.part, comm.size)

    def reports(taken: int) -> Sequence[float]:
        return (0.0, 0.0, 0.0, 0.0, float(comm.rank == comm.size - 1 and taken == 2))

    tickets, step = run(strategy, 10, 100_000, share_of, reports)
    assert 10 <= step < 100_000
    assert all_tickets(comm, tickets) == [(each, part) for each in range(10, step) for part in range(comm.size)]
    assert strategy.pace is not None
    assert strategy.pace.totals[4] == 1
    # The next stretch knows nothing of it.
    assert run(strategy, step, step + 3, share_of)[1] == step + 3


def test_a_straggler_takes_fewer_tickets_and_nobody_waits_for_it(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    strategy = hogwild(comm, network(), OptimizerOptions(momentum=0.0, lr=0.01))
    steps, slow_seconds = 20, 0.1

    def share_of(ticket: Ticket) -> Share:
        if comm.rank == 0:
            time.sleep(slow_seconds)
        return part_of(mini_batch(ticket.step, 4 * comm.size), ticket.part, comm.size)

    started = time.perf_counter()
    tickets, _ = run(strategy, 0, steps, share_of)
    seconds = time.perf_counter() - started
    counts = all_gather_object(comm, len(tickets))
    assert sum(counts) == steps * comm.size
    assert counts[0] < steps / 2
    # In step all would take as long as the slowest.
    assert seconds < steps * slow_seconds / 2


def test_numbers_under_the_lock_lose_no_change(comm: Communicator) -> None:
    shared = SharedNumbers(comm, 2)
    for _ in range(500):
        with shared as numbers:
            before = numbers[0]
            numbers[1] += comm.rank
            numbers[0] = before + 1
    comm.barrier().wait()
    with shared as numbers:
        assert numbers.tolist() == [500 * comm.size, 500 * sum(range(comm.size))]
    comm.barrier().wait()


# ---- one memory


def test_parameters_are_one_memory_and_buffers_are_private(comm: Communicator) -> None:
    torch.manual_seed(comm.rank)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).double())
    own = [value.detach().clone() for value in model.parameters()]
    strategy = hogwild(comm, model)
    firsts = all_gather_object(comm, [value.tolist() for value in own])[0]
    for parameter, first in zip(model.parameters(), firsts, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.tensor(first, dtype=parameter.dtype), rtol=0, atol=0)
    comm.barrier().wait()
    buffer: Any = model.get_submodule("1").running_mean
    buffer.fill_(comm.rank)
    for number, parameter in enumerate(model.parameters()):
        if number % comm.size == comm.rank:
            parameter.data.fill_(number)
    comm.barrier().wait()
    assert [parameter.data.unique().tolist() for parameter in model.parameters()] == [[number] for number in range(6)]
    assert bool((buffer == comm.rank).all())
    with strategy.consensus():
        torch.testing.assert_close(buffer, torch.full((5,), (comm.size - 1) / 2))
        assert len(set(all_gather_object(comm, parameters_sha256(model)))) == 1
    assert bool((buffer == comm.rank).all())
    strategy.finish()
    assert len(set(all_gather_object(comm, parameters_sha256(model)))) == 1
    weight = next(model.parameters()).data.fill_(comm.rank)
    comm.barrier().wait()
    assert bool((weight == comm.rank).all())


@pytest.mark.parametrize("sparse", [False, True])
def test_one_rank_is_serial_bit_for_bit(comm: Communicator, sparse: bool) -> None:
    alone: list[Communicator] = [SingleCommunicator()]
    samples, _ = sparse_data()
    options = OptimizerOptions(lr=0.2, momentum=0.0 if sparse else 0.9, clip_norm=0.5)
    sampler = EpochSampler(len(samples), 33, seed=2)

    def share_of(ticket: Ticket) -> Share:
        return shares_of(sampler, samples, 1)(ticket) if sparse else part_of(mini_batch(ticket.step, 7), 0, 1)

    def model() -> nn.Module:
        return SparseLogistic(FEATURES, 1) if sparse else network(torch.float32)

    serial = model()
    optimizer = build_optimizer(options, serial.parameters())
    for step in range(60):
        optimizer.zero_grad()
        share = share_of(Ticket(step, 0)) if sparse else part_of(mini_batch(step, 7, torch.float32), 0, 1)
        share.losses[0](serial).backward()
        clip_grad_norm_(serial.parameters(), 0.5)
        optimizer.step()
    for each in [*alone, comm] if comm.size == 1 else alone:
        strategy = hogwild(each, model(), options)

        def given(ticket: Ticket) -> Share:
            return share_of(ticket) if sparse else part_of(mini_batch(ticket.step, 7, torch.float32), 0, 1)

        assert run(strategy, 0, 60, given)[1] == 60
        strategy.finish()
        assert parameters_sha256(strategy.model) == parameters_sha256(serial)
        assert strategy.summary() == {"mean_staleness": 0.0, "staleness": {"0": 60}}


def test_sparse_gradients_are_clipped_like_dense_ones() -> None:
    model, dense = SparseLogistic(9, 2), nn.Linear(9, 2, bias=False)
    inputs = torch.tensor([[[1.0, 2.0], [4.0, -3.0]], [[4.0, 0.5], [7.0, 1.0]]])
    vectors = torch.zeros(2, 9).scatter_(1, inputs[:, :, 0].long(), inputs[:, :, 1])
    model(inputs).square().sum().add(model(inputs).sum()).backward()
    nn.init.zeros_(dense.weight)
    dense(vectors).square().sum().add(dense(vectors).sum()).backward()
    for limit in (100.0, 0.3):
        norms = clip_grad_norm_(model.parameters(), limit), nn.utils.clip_grad_norm_(dense.parameters(), limit)
        torch.testing.assert_close(*norms)
        assert model.rows.weight.grad is not None
        assert dense.weight.grad is not None
        torch.testing.assert_close(model.rows.weight.grad.to_dense(), dense.weight.grad.t())


# ---- what it reaches


def test_sparse_data_reach_the_serial_loss(comm: Communicator) -> None:
    """Mini-batches of 8 for each rank; the serial loop takes as many steps, of 8 samples too."""
    samples, test = sparse_data()
    epochs, batch = 6, 8
    serial = SparseLogistic(FEATURES, 1)
    optimizer = torch.optim.SGD(serial.parameters(), lr=0.5)
    order = EpochSampler(len(samples), batch, seed=4)
    for epoch in range(epochs):
        for step in range(order.steps_per_epoch):
            optimizer.zero_grad()
            loss_of(serial, samples, order.indices(epoch, step, 0, 1)).backward()
            optimizer.step()
    strategy = hogwild(comm, SparseLogistic(FEATURES, 1))
    sampler = EpochSampler(len(samples), batch * comm.size, seed=4)
    share_of = shares_of(sampler, samples, comm.size)
    for epoch in range(epochs):
        first = epoch * sampler.steps_per_epoch
        run(strategy, first, first + sampler.steps_per_epoch, share_of)
    strategy.finish()
    assert len(set(all_gather_object(comm, parameters_sha256(strategy.model)))) == 1
    for split in (samples, test):
        reached, expected = mean_loss(strategy.model, split), mean_loss(serial, split)
        assert expected < 0.5 * math.log(2)
        assert reached == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        OptimizerOptions(lr=0.02, momentum=0.9),
        OptimizerOptions(optimizer="adam", lr=0.01),
        OptimizerOptions(optimizer="adagrad", lr=0.05),
    ],
    ids=["momentum", "adam", "adagrad"],
)
def test_a_dense_network_learns_too(comm: Communicator, options: OptimizerOptions) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(256) % 4
    inputs = torch.randn(256, 6, generator=generator) + 4 * torch.eye(4, 6)[targets]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    strategy = hogwild(comm, model, options)
    sampler = EpochSampler(256, 16 * comm.size, seed=0)

    def share_of(ticket: Ticket) -> Share:
        epoch, position = divmod(ticket.step, sampler.steps_per_epoch)
        indices = sampler.indices(epoch, position, ticket.part, comm.size)

        def loss(model: nn.Module) -> Tensor:
            return functional.cross_entropy(model(inputs[indices]), targets[indices])

        return Share([loss], len(indices), sampler.global_count(position))

    run(strategy, 0, 10 * sampler.steps_per_epoch, share_of)
    with strategy.consensus(), torch.no_grad():
        model.eval()
        accuracy = float((model(inputs).argmax(1) == targets).float().mean())
        model.train()
    assert accuracy > 0.95
    views = all_gather_object(comm, accuracy)
    assert views == [accuracy] * comm.size


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch's Adagrad
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "sparseadam"])
def test_sparse_optimizers_touch_only_the_rows_of_their_samples(comm: Communicator, optimizer: str) -> None:
    momentum = 0.0 if optimizer == "sgd" else None
    strategy = hogwild(comm, SparseLogistic(40, 1), OptimizerOptions(optimizer=optimizer, lr=0.1, momentum=momentum))
    # Rank r has features 8 r to 8 r + 7.
    inputs = torch.stack([torch.arange(8.0) + 8 * comm.rank, torch.ones(8)], dim=1)[None]
    for _ in range(5):
        strategy.step(Share([lambda model: functional.softplus(-model(inputs)).mean()], 1, comm.size))
    comm.barrier().wait()
    weight = next(strategy.model.parameters()).detach()
    assert bool((weight[: 8 * comm.size] > 0).all())
    assert bool((weight[8 * comm.size :] == 0).all())
    assert torch.equal(weight[: 8 * comm.size].view(comm.size, 8), weight[:8].view(1, 8).expand(comm.size, 8))


# ---- staleness


def test_staleness_counts_the_updates_of_others_between_reading_and_writing(comm: Communicator) -> None:
    strategy = hogwild(comm, network(), OptimizerOptions(momentum=0.0, lr=0.01))
    share = part_of(mini_batch(0, comm.size), comm.rank, comm.size)
    late = 3 * (comm.size - 1)

    def slow(model: nn.Module) -> Tensor:
        comm.barrier().wait()
        comm.barrier().wait()
        return share.losses[0](model)

    if comm.rank == 0:
        strategy.step(Share([slow], 1, comm.size))
    else:
        comm.barrier().wait()
        for _ in range(3):
            strategy.step(share)
        comm.barrier().wait()
    comm.barrier().wait()
    summary = strategy.summary()
    assert sum(summary["staleness"].values()) == 1 + late
    assert max(map(int, summary["staleness"])) == late
    assert summary["staleness"][str(late)] == 1
    measures = all_gather_object(comm, strategy.measures())
    assert measures[0] == {"updates": 1, "staleness": late}
    sums = {name: sum(each[name] for each in measures) for name in measures[0]}
    assert strategy.figures(sums)["mean_staleness"] == pytest.approx(summary["mean_staleness"])
    assert strategy.measures() == {"updates": 0, "staleness": 0}
    assert strategy.figures({}) == strategy.figures(strategy.measures()) == {}


def test_an_update_that_loss_scaling_skips_is_none(comm: Communicator) -> None:
    strategy = hogwild(comm, network(torch.float32), PLAIN, scaling=LossScaling(torch.device("cpu")))
    before = parameters_sha256(strategy.model)
    batch = mini_batch(0, 4, torch.float32)

    def loss(model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1]) * 1e38

    strategy.step(Share([loss], 4, 4))
    comm.barrier().wait()
    assert parameters_sha256(strategy.model) == before
    assert strategy.skipped_steps() == 1
    assert strategy.summary() == {"mean_staleness": None, "staleness": {}}


# ---- checkpoints


def test_a_run_goes_on_from_its_state(comm: Communicator) -> None:
    """Bit for bit on one rank; on more, each with its own momentum, from the parameters that were."""
    options = OptimizerOptions(lr=0.02, momentum=0.9)
    count = 4 * comm.size

    def share_of(ticket: Ticket) -> Share:
        return part_of(mini_batch(ticket.step, count), ticket.part, comm.size)

    def made_anew() -> Hogwild:
        return hogwild(comm, nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double(), options)

    whole = made_anew()
    step = run(whole, 0, 15, share_of)[1]
    with whole.consensus():
        model = {name: value.detach().clone() for name, value in whole.model.state_dict().items()}
    state = copy.deepcopy(whole.state_dict())
    shared_optimizer = copy.deepcopy(whole.optimizer.state_dict())
    resumed = made_anew()
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(shared_optimizer)
    resumed.load_state_dict(state)
    for (name, mine), theirs in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    torch.testing.assert_close(resumed.optimizer.state_dict(), state["optimizer"], rtol=0, atol=0)
    assert resumed.summary() == whole.summary()
    assert run(whole, step, 30, share_of)[1] == run(resumed, step, 30, share_of)[1] == 30
    assert sum(resumed.summary()["staleness"].values()) == 30 * comm.size
    if comm.size == 1:
        assert parameters_sha256(resumed.model) == parameters_sha256(whole.model)


# ---- what is refused


def test_a_gradient_that_is_not_finite_is_named(comm: Communicator) -> None:
    strategy = hogwild(comm, SparseLogistic(5, 1), PLAIN, GradientOptions(check_finite=True))
    pair = torch.tensor([[[2.0, float("nan")]]])
    with pytest.raises(NonFiniteError, match=rf"the loss, the gradient of rows.weight of rank {comm.rank}$"):
        strategy.step(Share([lambda model: model(pair).mean()], 1, 1))
    strategy.step(Share([lambda model: model(torch.ones(1, 1, 2)).mean()], 1, 1))
    comm.barrier().wait()
    assert next(strategy.model.parameters()).detach().flatten().tolist()[2] == 0.0


@pytest.mark.parametrize(
    ("options", "sparse", "problem"),
    [
        (OptimizerOptions(optimizer="lbfgs"), False, "--optimizer lbfgs: strategy hogwild needs one that updates each"),
        (OptimizerOptions(optimizer="adafactor"), False, "--optimizer adafactor: strategy hogwild needs one that"),
        (OptimizerOptions(optimizer="adam"), True, "--optimizer adam: it takes no sparse gradients, which the model"),
        (OptimizerOptions(), True, r"--momentum 0\.9: strategy hogwild writes only the rows that sparse gradients"),
        (OptimizerOptions(momentum=0.0, weight_decay=0.1), True, r"--weight-decay 0\.1: it changes all rows of the"),
    ],
)
def test_optimizers_that_do_not_suit(comm: Communicator, options: OptimizerOptions, sparse: bool, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^{problem}"):
        hogwild(comm, SparseLogistic(5, 1) if sparse else network(), options)


def test_ranks_that_share_no_memory_are_refused(topology: Topology) -> None:
    if topology.size == 1:
        pytest.skip("one rank needs none")
    nodes = made(topology, node_color=topology.rank % 2)
    with pytest.raises(ConfigError, match=r"^--strategy hogwild: needs all ranks on one node, with --backend mpi"):
        hogwild(nodes, network())
    nodes.close()


# ---- the sparse model in other strategies


@pytest.mark.parametrize("name", ["sync", "local"])
def test_other_strategies_train_the_sparse_model(comm: Communicator, name: str) -> None:
    """Both equal serial SGD: local with a period of 1."""
    samples, _ = sparse_data()
    sampler = EpochSampler(len(samples), 10 * comm.size + 1, seed=0)
    choice = StrategyOptions(strategy=name, period=1 if name == "local" else None)
    gradients = GradientOptions(check_finite=True)
    # Local steps are clipped each by itself, so only sync clips as serial SGD does.
    options = OptimizerOptions(lr=0.5, momentum=0.0, clip_norm=0.1 if name == "sync" else 10.0)
    strategy = strategy_on(comm, SparseLogistic(FEATURES, 1).double(), choice, options, gradients)
    serial = SparseLogistic(FEATURES, 1).double()
    optimizer = torch.optim.SGD(serial.parameters(), lr=0.5)
    for step in range(20):
        strategy.step(shares_of(sampler, samples, comm.size)(Ticket(step, comm.rank)))
        optimizer.zero_grad()
        loss_of(serial, samples, sampler.indices(0, step, 0, 1)).backward()
        clip_grad_norm_(serial.parameters(), options.clip_norm or 0.0)
        optimizer.step()
    strategy.finish()
    assert_same(strategy.model, serial)
