"""Anchored methods between exchanges and after the end: checkpoints, other ranks, where parameters lie, refusals."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.anchored import Anchored
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.elastic import Elastic
from allreduce_sgd.strategies.local import Local, PostLocal
from allreduce_sgd.strategies.period import Period
from allreduce_sgd.strategies.slowmo import SlowMo
from tests.mpi.anchoring import anchored
from tests.mpi.test_anchored import ADAM, LATE, METHODS, assert_equal_on_all, sent_bytes, train_one
from tests.mpi.test_strategies import mini_batch, part_of, train

# ---- going on


@pytest.mark.parametrize(
    ("name", "codec", "more"),
    [
        ("local", "none", {"delay": 3}),
        ("local", "powersgd", {"delay": 2}),
        ("local", "none", {"inner_state": "average"}),
        ("slowmo", "none", {}),
        ("slowmo", "top-k", {"delay": 3, "inner_state": "reset"}),
        ("bmuf", "none", {"delay": 1, "inner_state": "average"}),
        ("diloco", "none", {"delay": 3, "fragments": 3}),
        ("diloco", "int8", {"delay": 2, "fragments": 2}),
        ("easgd", "none", {}),
    ],
)
@pytest.mark.parametrize("cut", [2, 4, 5, 6])
def test_a_run_goes_on_bit_for_bit(comm: Communicator, name: str, codec: str, more: dict[str, Any], cut: int) -> None:
    """Cut in the middle of a period, at an exchange, and with one under way; through a file."""

    def make() -> Anchored:
        return anchored(comm, METHODS[name](comm.size), 4, ADAM, compression=CompressionOptions(codec), **more)

    undisturbed, whole, resumed = make(), make(), make()
    train(undisturbed, comm, 11, 7)
    train(whole, comm, cut, 7)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    # It must not depend on what another run had left there.
    train(resumed, comm, 3, 5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for strategy in (whole, resumed):
        for step in range(cut, 11):
            train_one(strategy, step, 7)
        assert parameters_sha256(strategy.model) == parameters_sha256(undisturbed.model)
        with strategy.consensus(), undisturbed.consensus():
            assert parameters_sha256(strategy.model) == parameters_sha256(undisturbed.model)


@pytest.mark.parametrize(("name", "delay"), [*((name, 0) for name in METHODS), *((name, 2) for name in LATE)])
def test_a_run_goes_on_with_another_number_of_ranks(comm: Communicator, name: str, delay: int) -> None:
    """From the consensus model alone: it is the new anchor, and the period begins at the step that was reached."""
    more: dict[str, Any] = {} if name == "easgd" else {"delay": delay}
    before = anchored(comm, METHODS[name](comm.size), 4, **more)
    train(before, comm, 6, 12)
    with before.consensus():
        agreed = copy.deepcopy(before.model.state_dict())
    alone = SingleCommunicator()
    for on, ranks in ((alone, 1), (comm, comm.size)):
        after, fresh = (anchored(on, METHODS[name](ranks), 4, **more) for _ in range(2))
        train(after, on, 5, 12)
        after.model.load_state_dict(agreed)
        after.restart(6)
        # As a run that begins with that model.
        fresh.model.load_state_dict(agreed)
        fresh.restart(0)
        for step in range(9):
            for strategy in (after, fresh):
                strategy.step(part_of(mini_batch(step, 12), on.rank, on.size))
        assert parameters_sha256(after.model) == parameters_sha256(fresh.model)
    before.finish()


def test_a_restart_knows_the_step(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")
    strategy = anchored(comm, PostLocal(), Period(4, switch=5))
    strategy.restart(6)
    found = []
    for step in range(7, 16):
        before = sent_bytes(comm)
        train_one(strategy, step, 12)
        if sent_bytes(comm) > before:
            found.append(step)
    assert found == [10, 14]


# ---- what is refused


@pytest.mark.parametrize(
    ("period", "more", "told"),
    [
        (Period(8), {"delay": 8}, r"--delay 8: slowmo exchanges models every 8 steps, .*; choose 0 to 7$"),
        (Period(1), {"delay": 1}, r"--delay 1: slowmo exchanges models every step, .*; choose 0$"),
        (Period(8, "rising", 99), {"delay": 2}, r"--delay 2: slowmo exchanges models every step at times, .*choose 0$"),
        (Period(4), {"fragments": 5}, r"--fragments 5: slowmo exchanges .*every 4 steps, .*; choose 1 to 4$"),
        (Period(8), {"fragments": 5}, r"--fragments 5: the model has 4 parameter tensors, .*; choose 1 to 4$"),
    ],
)
def test_exchanges_that_would_overtake_one_another_are_refused(
    comm: Communicator, period: Period, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        anchored(comm, SlowMo(), period, **more)


def test_what_means_nothing_is_refused(comm: Communicator) -> None:
    with pytest.raises(ConfigError, match="--inner-state average: LBFGS keeps a history"):
        anchored(comm, Local(), 4, OptimizerOptions(optimizer="lbfgs"), inner_state="average")
    with pytest.raises(ConfigError, match=r"--error-feedback: in easgd .*; choose --no-error-feedback$"):
        anchored(comm, Elastic(comm.size), 4, compression=CompressionOptions("top-k"))
    with pytest.raises(ConfigError, match="--delay 1: an exchange of easgd lasts from one step to the next anyway"):
        anchored(comm, Elastic(comm.size), 4, delay=1)


def large_network() -> nn.Module:
    """Of buckets that ranks of a node reduce out of each other's memory."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(101, 203), nn.Linear(203, 7))


def places_of(strategy: Anchored) -> set[int]:
    (fragment,) = strategy._fragments
    return {slot.data_ptr() for piece in fragment.pieces for slot in piece.signal.slots}


def test_plain_averages_reduce_parameters_where_they_lie(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank alone exchanges nothing")
    model = large_network()
    strategy = anchored(comm, Local(), 2, model=model, gradients=GradientOptions())
    places = places_of(strategy)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    # Equal shares need nothing but the all-reduce; unequal ones are weighed in place.
    for uneven in (0, 1):
        counts = [4 + uneven * rank for rank in range(comm.size)]
        counts[0] += uneven * (sum(counts) % comm.size == 0)
        assert {one.data_ptr() for one in model.parameters()} == places
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + comm.rank)
        for _ in range(2):
            strategy.step(Share([], counts[comm.rank], sum(counts)))
        mean = sum(count * (1 + rank) for rank, count in enumerate(counts)) / sum(counts)
        for parameter, value in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), value.mul_(mean))
    strategy.finish()
    assert not {one.data_ptr() for one in model.parameters()} & places
    # Going on after the end, with parameters in private memory.
    strategy.measures()
    for _ in range(2):
        strategy.step(Share([], 1, comm.size))
    for parameter, value in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    assert strategy.figures(reduced(comm, strategy.measures()))["model_distance"] < 1e-4


def reduced(comm: Communicator, measures: dict[str, float]) -> dict[str, float]:
    sums = torch.tensor(list(measures.values()), dtype=torch.float64)
    return dict(zip(measures, comm.all_reduce(sums).wait().tolist(), strict=True))


def test_all_ranks_reduce_alike_whatever_samples_they_have_seen(comm: Communicator) -> None:
    # 3 ranks: shares of 7 and 5 samples are 3, 2, 2 and 2, 2, 1, so that rank 1 alone has seen the mean of all.
    strategy = anchored(comm, Local(), 2)
    for step, count in enumerate((7, 5)):
        strategy.step(part_of(mini_batch(step, count), comm.rank, comm.size))
    assert_equal_on_all(comm, strategy.model)


def test_parameters_that_were_given_other_memory_are_still_averaged(comm: Communicator) -> None:
    strategy = anchored(comm, Local(), 2)
    flat = nn.utils.parameters_to_vector(strategy.model.parameters()).detach()
    nn.utils.vector_to_parameters(flat * (1 + comm.rank), strategy.model.parameters())
    for _ in range(2):
        strategy.step(Share([], 1, comm.size))
    mean = flat * (1 + comm.size) / 2
    torch.testing.assert_close(nn.utils.parameters_to_vector(strategy.model.parameters()).detach(), mean)
