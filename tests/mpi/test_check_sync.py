"""Checking that replicas are equal: every difference is found, told alike on all ranks, and equality costs little."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd import convert_sync_batchnorm
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.errors import MismatchError
from allreduce_sgd.gradients.check_sync import SyncCheck
from allreduce_sgd.gradients.replicate import ranks_text
from allreduce_sgd.gradients.sync_batch_norm import close_sync_batchnorm
from tests.mpi.replicas import network


def several(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs a second rank")


class Assorted(nn.Module):
    """Parameters of odd lengths, several dtypes and layouts, one with elements that lie apart."""

    def __init__(self) -> None:
        super().__init__()
        values: dict[str, Tensor] = {
            "one": torch.tensor(1.5),
            "odd": torch.arange(7.0),
            "narrow": torch.ones(5, dtype=torch.bfloat16),
            "complex_numbers": torch.ones(3, dtype=torch.complex64),
            "transposed": torch.arange(12.0).view(3, 4).t(),
            "images": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "many": torch.zeros(200_003),
            "wide": torch.zeros(9, dtype=torch.float64),
        }
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))


def test_equal_replicas_pass_at_the_cost_of_one_small_message(any_comm: Communicator) -> None:
    check = SyncCheck(Assorted(), any_comm)
    before = any_comm.traffic.bytes_sent
    check.check("now")
    if any_comm.traffic.bytes_sent is not None and before is not None:
        assert any_comm.traffic.bytes_sent - before <= 16 * 2 * any_comm.size


@pytest.mark.parametrize("name", [name for name, _ in Assorted().named_parameters()])
@pytest.mark.parametrize("position", [0, -1])
def test_one_bit_on_one_rank_is_found_and_named_on_all(comm: Communicator, name: str, position: int) -> None:
    several(comm)
    model = Assorted()
    if comm.rank == comm.size - 1:
        with torch.no_grad():
            parameter = model.get_parameter(name)
            value = parameter.reshape(-1).clone()
            value.view(torch.uint8)[position] ^= 1
            parameter.copy_(value.view(parameter.shape))
    others = ranks_text(list(range(comm.size - 1)))
    told = rf"now: ranks no longer hold the same model: parameter '{name}' differs "
    told += rf"\(digests: {others}: [0-9a-f]{{16}}; rank {comm.size - 1}: [0-9a-f]{{16}}\), no other of the 8 compared$"
    with pytest.raises(MismatchError, match=told):
        SyncCheck(model, comm).check("now")


def test_elements_that_changed_places_are_found(comm: Communicator) -> None:
    several(comm)
    for first, second in ((0, 1), (0, 2), (3, 150_000), (1, 131_073)):
        model = Assorted()
        with torch.no_grad():
            model.get_parameter("many").copy_(torch.arange(200_003.0))
            if comm.rank == 0:
                model.get_parameter("many")[[first, second]] = torch.tensor([float(second), float(first)])
        with pytest.raises(MismatchError, match="'many' differs"):
            SyncCheck(model, comm).check("now")


def test_bits_count_not_values(comm: Communicator) -> None:
    several(comm)
    model = Assorted()
    with torch.no_grad():
        model.get_parameter("odd").fill_(float("nan"))
    SyncCheck(model, comm).check("now")
    with torch.no_grad():
        model.get_parameter("wide").fill_(-0.0 if comm.rank == 1 else 0.0)
    with pytest.raises(MismatchError, match="'wide' differs"):
        SyncCheck(model, comm).check("now")


def test_the_first_of_several_differences_is_named_and_the_others_counted(comm: Communicator) -> None:
    several(comm)
    model = Assorted()
    with torch.no_grad():
        model.get_parameter("narrow").fill_(float(comm.rank))
        model.get_parameter("odd").fill_(float(comm.rank % 2))
    even, odd = (ranks_text(list(range(first, comm.size, 2))) for first in (0, 1))
    told = rf"parameter 'odd' differs \(digests: {even}: \w+; {odd}: \w+\), and 1 more of the 8 compared"
    with pytest.raises(MismatchError, match=told):
        SyncCheck(model, comm).check("now")


def test_it_is_due_every_so_many_steps_at_the_next_occasion(comm: Communicator) -> None:
    check = SyncCheck(network(), comm, every=3)
    done: list[str] = []
    check.check = done.append  # type: ignore[assignment, method-assign]
    for step in (1, 2, 3, 4, 5, 8, 9, 10, 11, 12):
        check.after_step(step)
    assert done == ["after step 3", "after step 8", "after step 11"]


@pytest.mark.parametrize("synchronised", [False, True])
def test_statistics_count_where_they_are_those_of_all_ranks(comm: Communicator, synchronised: bool) -> None:
    several(comm)
    model: Any = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    if synchronised:
        convert_sync_batchnorm(model, comm)
    model[1].running_mean.fill_(float(comm.rank == 1))
    check = SyncCheck(model, comm)
    if synchronised:
        with pytest.raises(MismatchError, match=r"buffer '1\.running_mean' differs"):
            check.check("now")
    else:
        check.check("now")
    close_sync_batchnorm(model)
