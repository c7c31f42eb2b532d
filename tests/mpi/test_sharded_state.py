"""The state of a ShardedOptimizer: that of the unsharded one, and a part of it on every rank."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.sharded import Groups, ShardedOptimizer
from allreduce_sgd.topology import Topology
from tests.mpi.conftest import connected
from tests.mpi.replicas import assert_same_parameters
from tests.mpi.sharding import ELEMENTWISE, WHOLE, Model, assert_same_bits, several_groups, train, wrapped


def assert_same_state(given: Any, wanted: Any, where: str = "state") -> None:
    """Assert that two state_dicts are equal, to the bit."""
    if isinstance(wanted, dict):
        assert given.keys() == wanted.keys(), where
        for key in wanted:
            assert_same_state(given[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(given) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_same_state(given[index], value, f"{where}.{index}")
    elif isinstance(wanted, Tensor):
        assert given.dtype is wanted.dtype, where
        assert torch.equal(given, wanted), where
    else:
        assert given == wanted, where


@pytest.fixture(scope="module")
def comm(topology: Topology) -> Iterator[Communicator]:
    """One that adds in the order of a reduce-scatter, whatever messages were measured to cost on this machine."""
    made = connected(topology, "mpi", "shared-memory")
    yield made
    made.close()


@pytest.fixture(scope="module")
def pair(comm: Communicator) -> Iterator[Communicator]:
    """Two ranks each, or one."""
    made = comm.split(comm.rank // 2)
    yield made
    made.close()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_state_is_that_of_the_unsharded_one_and_goes_to_any_number_of_ranks(
    comm: Communicator, pair: Communicator, name: str
) -> None:
    make, groups_of = ELEMENTWISE[name], several_groups
    plain, sharded = wrapped(comm), wrapped(comm)
    before = make(groups_of(plain.module))
    train(plain, before, comm.rank, range(3))
    optimizer = ShardedOptimizer(sharded, make, groups_of(sharded.module))
    train(sharded, optimizer, comm.rank, range(3))
    wanted, state = before.state_dict(), optimizer.state_dict()
    # No rank has a shard of an empty parameter, so there is no state for it.
    for place, parameter in enumerate(one for group in groups_of(plain.module) for one in group["params"]):
        if parameter.numel() == 0:
            wanted["state"].pop(place, None)
            state["state"].pop(place, None)
    assert_same_state(state, wanted)

    # Pairs of ranks go on from it, sharded or not, each pair by itself.
    followers = []
    for shard in (False, True):
        ddp = DistributedDataParallel(Model(), pair, bucket_mb=1e-4)
        ddp.module.load_state_dict(sharded.module.state_dict())
        follower = ShardedOptimizer(ddp, make, groups_of(ddp.module)) if shard else make(groups_of(ddp.module))
        # torch's optimizers keep the tensors that they are given.
        follower.load_state_dict(copy.deepcopy(state))
        train(ddp, follower, comm.rank, range(3, 5))
        followers.append(ddp.module)
    assert_same_bits(followers[1], followers[0])


@pytest.mark.parametrize("name", WHOLE)
def test_optimizers_that_need_whole_parameters(comm: Communicator, name: str) -> None:
    def matrices(module: Any) -> Groups:
        return [{"params": [module.first.weight, module.second.weight, module.third.weight]}]

    make = WHOLE[name]
    plain, sharded = wrapped(comm), wrapped(comm)
    before = make(matrices(plain.module))
    after = ShardedOptimizer(sharded, make, matrices(sharded.module))
    train(plain, before, comm.rank, range(4))
    train(sharded, after, comm.rank, range(4))
    assert_same_parameters(sharded.module, plain.module)
    assert not torch.equal(sharded.module.get_parameter("first.weight"), Model().first.weight)
    state = after.state_dict()
    after.load_state_dict(copy.deepcopy(state))
    before.load_state_dict(copy.deepcopy(state))
    train(plain, before, comm.rank, range(4, 6))
    train(sharded, after, comm.rank, range(4, 6))
    assert_same_parameters(sharded.module, plain.module)


@pytest.mark.parametrize("bucket_mb", [0.2, 25.0])
def test_the_state_of_a_rank_is_its_part(comm: Communicator, bucket_mb: float) -> None:
    model = nn.Sequential(nn.Linear(300, 401), nn.Linear(401, 300))
    ddp = DistributedDataParallel(model, comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb)
    optimizer = ShardedOptimizer(ddp, ELEMENTWISE["adam"])
    ddp(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    moments_bytes = 2 * 4 * sum(parameter.numel() for parameter in ddp.parameters())
    assert optimizer.state_bytes() == pytest.approx(moments_bytes / comm.size, rel=0.01)
    everyone = comm.all_reduce(torch.tensor([optimizer.state_bytes()])).wait()
    # A scalar for each of the four parameters counts its steps.
    assert moments_bytes < int(everyone) <= moments_bytes + 4 * 4 * comm.size
