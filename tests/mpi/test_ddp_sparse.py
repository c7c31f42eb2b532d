"""Sparse gradients, those of Embedding and EmbeddingBag, against dense ones."""

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd import DistributedDataParallel
from allreduce_sgd.comm.base import Communicator
from tests.mpi.replicas import Replicas, assert_same_gradients, assert_same_parameters, gradient_of


class Bags(nn.Module):
    """Sparse gradients beside dense ones; rows drawn repeatedly."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 3, sparse=sparse)
        self.bags = nn.EmbeddingBag(7, 3, mode="sum", sparse=sparse)
        self.head = nn.Linear(3, 1)
        self.double()

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(rows).mean(dim=1) + self.bags(rows % 7))).square().mean()


def rows(rank: int, step: int) -> Tensor:
    return torch.randint(11, (2 + rank, 4), generator=torch.Generator().manual_seed(10 * step + rank))


@pytest.mark.parametrize("static_graph", [False, True])
def test_sparse_gradients(comm: Communicator, static_graph: bool) -> None:
    """Against dense embeddings; ranks draw different numbers of rows; accumulated, and updated from, in between."""
    ddp = DistributedDataParallel(Bags(), comm, bucket_mb=1e-4, static_graph=static_graph)
    replicas = Replicas(lambda: Bags(sparse=False), comm.size)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in [ddp.module, *replicas.models]]
    for step, letter in enumerate("ssnsnns"):
        if letter == "n":
            with ddp.no_sync():
                ddp(rows(comm.rank, step)).backward()
        else:
            ddp(rows(comm.rank, step)).backward()
        replicas.backward(lambda model, rank, step: model(rows(rank, step)), step, letter == "s")
        assert gradient_of(ddp.module.get_parameter("words.weight")).is_sparse
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        if letter == "s":
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert_same_parameters(ddp.module, replicas.models[comm.rank])


class MaybeWords(Bags):
    def forward(self, rows: Tensor, chosen: str = "words bags") -> Tensor:
        parts = [self.words(rows).mean(dim=1)] if "words" in chosen else []
        parts += [self.bags(rows % 7)] if "bags" in chosen else []
        return self.head(torch.tanh(torch.stack(parts).sum(dim=0))).square().mean()


def test_sparse_gradients_that_some_or_all_ranks_lack(comm: Communicator) -> None:
    def run(model: nn.Module, rank: int, step: int) -> Tensor:
        # The words on one rank alone, in turn; the bags not in steps 0 and 3.
        chosen = ("words " if step % comm.size == rank else "") + ("bags" if step % 3 else "words")
        return model(rows(rank, step), chosen)

    ddp = DistributedDataParallel(MaybeWords(), comm, bucket_mb=1e-4)
    replicas = Replicas(lambda: MaybeWords(sparse=False), comm.size)
    for step in range(6):
        run(ddp, comm.rank, step).backward()
        replicas.backward(run, step)
        assert_same_gradients(ddp.module, replicas.models[comm.rank])
        ddp.zero_grad()
        replicas.zero_grad()
