"""Sums over ranks in the order of a fixed tree: the bits of the serial sum, on every rank count, for any length."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.gradients.fixed_tree import FixedTree, Node, PartialSums


def serial(leaves: list[Tensor]) -> Tensor:
    """The definition: the left part is the largest power of two of leaves that leaves something for the right one."""
    if len(leaves) == 1:
        return leaves[0]
    middle = 1
    while 2 * middle < len(leaves):
        middle *= 2
    return serial(leaves[:middle]) + serial(leaves[middle:])


def vectors(leaf: int, lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Numbers of very different size, so that every other order rounds differently."""
    generator = torch.Generator().manual_seed(leaf)
    return [
        (torch.randn(length, generator=generator) * 2.0 ** torch.randint(-6, 7, (length,), generator=generator)).to(
            dtype
        )
        for length in lengths
    ]


def summed(comm: Communicator, leaves: int, lengths: list[int], dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """The sums of the tree, and how many sets of vectors were in use at once."""
    tree = FixedTree(leaves, comm)
    total = [comm.allocate(length, dtype, torch.device("cpu")) for length in lengths]
    sums, depths = PartialSums(tree, total), []
    for leaf in tree.own:
        depths.append(sums.depth + 1)
        for target, vector in zip(sums.leaf(), vectors(leaf, lengths, dtype), strict=True):
            target.copy_(vector)
        sums.add()
    sums.finish()
    return total, max(depths)


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_the_bits_are_those_of_the_serial_sum(comm: Communicator, dtype: torch.dtype) -> None:
    lengths = sorted({0, 1, comm.size - 1, comm.size, comm.size + 1, 1000})
    for each in (1, 2, 3, 5, 8):
        leaves = each * comm.size
        given = [vectors(leaf, lengths, dtype) for leaf in range(leaves)]
        expected = [serial(list(column)) for column in zip(*given, strict=True)]
        total, depth = summed(comm, leaves, lengths, dtype)
        assert [bits(one) for one in total] == [bits(one) for one in expected]
        if each == 8:
            assert depth == 4


def test_other_orders_would_show() -> None:
    given = [vectors(leaf, [1000], torch.float32)[0] for leaf in range(6)]
    assert not torch.equal(serial(given), torch.stack(given).sum(0))
    assert not torch.equal(serial(given), serial(given[:3]) + serial(given[3:]))


def test_over_every_back_end_with_messages(any_comm: Communicator) -> None:
    if any_comm.size > 1 and any_comm.backend == "nccl":
        with pytest.raises(ValueError, match="back end nccl has no messages between two ranks"):
            FixedTree(any_comm.size, any_comm)
        return
    for dtype in (torch.float32, torch.bfloat16):
        leaves = 6 * any_comm.size
        total, _ = summed(any_comm, leaves, [37], dtype)
        assert bits(total[0]) == bits(serial([vectors(leaf, [37], dtype)[0] for leaf in range(leaves)]))


def test_bytes_are_those_of_a_ring_where_nodes_are_whole(comm: Communicator) -> None:
    numel = 12 * 64
    for each, nodes in ((1, 1), (4, 1), (3, 2)):
        leaves = each * comm.size
        tree = FixedTree(leaves, comm)
        held = len(tree.root.within(tree.own.start, tree.own.stop))
        if comm.size > 1:
            assert held == nodes
        before = comm.traffic.bytes_sent or 0
        summed(comm, leaves, [numel], torch.float32)
        # Allocating meets all ranks, with a few bytes.
        sent = (comm.traffic.bytes_sent or 0) - before
        assert sent == pytest.approx((held + 1) * (comm.size - 1) / comm.size * 4 * numel, abs=64)


@pytest.mark.parametrize("leaves", [1, 2, 3, 6, 7, 12, 33])
def test_nodes_of_ranges_are_largest_and_cover_them(leaves: int) -> None:
    root = Node(0, leaves)
    for start in range(leaves):
        for stop in range(start + 1, leaves + 1):
            nodes = root.within(start, stop)
            assert [leaf for node in nodes for leaf in range(*node)] == list(range(start, stop))
            assert len(nodes) <= max(1, 2 * (stop - start).bit_length())
            assert all(root.within(*node) == [node] for node in nodes)
            spans = [(left.start, right.stop) for left, right in pairwise(nodes)]
            assert all(root.within(*span) != [span] for span in spans)


def test_what_cannot_be_shared_out_is_refused(comm: Communicator) -> None:
    if comm.size > 1:
        with pytest.raises(
            ValueError, match=f"{comm.size + 1} leaves cannot be shared out evenly to {comm.size} ranks"
        ):
            FixedTree(comm.size + 1, comm)
    sums = PartialSums(FixedTree(2, SingleCommunicator()), [torch.zeros(3)])
    sums.leaf()[0].fill_(1)
    sums.add()
    with pytest.raises(RuntimeError, match="leaf 1 of 2 has not been added"):
        sums.finish()


def test_a_back_end_without_messages_is_refused() -> None:
    class Other(SingleCommunicator):
        backend: Any = "horovod"
        size = 2

    with pytest.raises(ValueError, match="back end horovod has no messages between two ranks; take mpi or gloo"):
        FixedTree(2, Other())
