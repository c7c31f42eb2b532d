"""Averages of weights on any number of ranks, against torch's AveragedModel and update_bn in one process."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.feed import Feed
from allreduce_sgd.models.losses import build_loss
from allreduce_sgd.selection.average import Average, holding
from allreduce_sgd.selection.batch_statistics import recompute_statistics
from allreduce_sgd.selection.ema import decay_at

DECAY, STEPS = 0.6, 12
Tensors = tuple[Tensor, ...] | list[Tensor]


def network() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 7))
    model[3].bias.requires_grad_(False)
    model[0].double()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def walk(model: nn.Module, step: int, rank: int = 0) -> None:
    """Change the parameters as if by a step of training."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def ema_of(rank: int) -> list[Tensor]:
    """The average as torch's class has it, of the model that this rank walks."""
    model = network()
    updates = [0]

    def average(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
        updates[0] = int(count)
        get_ema_multi_avg_fn(min(DECAY, (1 + int(count)) / (10 + int(count))))(averages, values, count)

    averaged = AveragedModel(model, multi_avg_fn=average)
    for step in range(STEPS):
        walk(model, step, rank)
        averaged.update_parameters(model)
    assert updates == [STEPS - 1]
    return trained(averaged.module)


def averaged(average: Average) -> list[Tensor]:
    return [value.clone() for _, value in sorted_pairs(average)]


def sorted_pairs(average: Average) -> list[tuple[nn.Parameter, Tensor]]:
    pairs = average.gathered()
    return sorted(pairs, key=lambda pair: pair[0].dtype != torch.float64)


@pytest.mark.parametrize("replicated", [True, False])
def test_moving_average_is_torchs(comm: Communicator, replicated: bool) -> None:
    model = network()
    average = Average(model, comm, replicated)
    rank = 0 if replicated else comm.rank
    other = None
    for step in range(STEPS):
        walk(model, step, rank)
        average.update_(1 - decay_at(DECAY, average.updates))
        if step == 4:
            # What a checkpoint keeps: shared by all ranks, and of this rank alone.
            shared, own = average.state_dict(), average.own_state_dict()
            other = Average(model, comm, replicated)
            other.load_state_dict(own or shared, average.updates)
        elif other is not None:
            other.update_(1 - decay_at(DECAY, other.updates))
    ranks = [0] if replicated else list(range(comm.size))
    expected = [torch.stack(each).mean(0) for each in zip(*map(ema_of, ranks), strict=True)]
    found = averaged(average)
    if len(ranks) == 1:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        torch.testing.assert_close(found, expected)
    assert other is not None
    torch.testing.assert_close(averaged(other), found, rtol=0, atol=0)
    assert average.own_state_dict().keys() == (set() if replicated else average.state_dict().keys())


def test_equal_average_and_the_model_comes_back(comm: Communicator) -> None:
    model = network()
    average = Average(model, comm, replicated=True)
    visited = []
    for step in range(STEPS):
        walk(model, step)
        visited.append(trained(model))
        average.update_(1 / (1 + average.updates))
    expected = [torch.stack(each).mean(0) for each in zip(*visited, strict=True)]
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with holding(average.gathered()):
        torch.testing.assert_close(trained(model), expected)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    torch.testing.assert_close(trained(model), visited[-1], rtol=0, atol=0)


@pytest.mark.parametrize("parts", [1, 3])
def test_statistics_are_those_of_update_bn_on_all_samples(comm: Communicator, parts: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1300, 6) * 3 + 1
    split = Split(inputs, torch.zeros(1300, dtype=torch.int64))
    feed = Feed(Dataset("x", split, split, (6,), 2), build_loss(None, "mlp", 2), torch.device("cpu"), "fp32", 1)
    last = nn.BatchNorm1d(4, momentum=None)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 4), last)
    reference = copy.deepcopy(model)
    before = torch.get_rng_state()
    recompute_statistics(model, feed.training_inputs, comm, 7, parts)
    assert torch.equal(torch.get_rng_state(), before)
    assert model[0].momentum == 0.1
    of = comm.size * parts
    batches = [batch for part in range(of) for batch in feed.training_inputs(part, of)]
    assert torch.equal(torch.cat(batches), inputs)
    update_bn(batches, reference)
    # The second layer sees dropout, whose masks the parts draw by themselves.
    torch.testing.assert_close(model[0].state_dict(), reference[0].state_dict())
    torch.testing.assert_close(model[3].running_var, reference[3].running_var, rtol=0.2, atol=0.1)
    assert last.num_batches_tracked is not None
    assert last.running_mean is not None
    assert int(last.num_batches_tracked) == len(batches)
    gathered = torch.zeros(comm.size, 4)
    gathered[comm.rank] = last.running_mean
    comm.all_gather(gathered.view(-1)).wait()
    assert torch.equal(gathered, gathered[:1].expand_as(gathered))
