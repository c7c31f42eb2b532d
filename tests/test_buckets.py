"""How parameters are assigned to buckets."""

import torch
from torch import nn

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.gradients.buckets import assign, build_buckets


def parameters(*counts: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(count, dtype=dtype)) for count in counts]


def test_buckets_fill_in_reverse_order_the_first_one_smaller() -> None:
    # 4 bytes an element: the first bucket closes at 40 bytes or more, the others at 400.
    assert assign(parameters(30, 60, 60, 5, 5), 40, 400) == [[4, 3], [2, 1], [0]]
    assert assign(parameters(1000), 40, 400) == [[0]]
    assert assign([], 40, 400) == []


def test_a_bucket_smaller_than_the_first_size_bounds_the_first_too() -> None:
    assert assign(parameters(5, 5, 5), 4000, 20) == [[2], [1], [0]]


def test_dtypes_have_buckets_of_their_own_ordered_by_when_they_fill() -> None:
    mixed = parameters(5) + parameters(5, dtype=torch.float64) + parameters(5) + parameters(5, dtype=torch.float64)
    buckets = assign(mixed, 1000, 1000)
    assert buckets == [[3, 1], [2, 0]]
    assert sorted(index for bucket in buckets for index in bucket) == [0, 1, 2, 3]


def test_slots_view_the_buffer_side_by_side_in_the_parameters_own_layout() -> None:
    image = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    transposed = nn.Parameter(torch.zeros(3, 5).t())
    plain = nn.Parameter(torch.zeros(4))
    (bucket,) = build_buckets([plain, transposed, image], SingleCommunicator(), 1e6, 1e6)
    assert [slot.shape for slot in bucket.slots] == [image.shape, transposed.shape, plain.shape]
    assert bucket.slots[0].stride() == image.stride()
    assert bucket.slots[1].stride() == transposed.stride()
    for index, slot in enumerate(bucket.slots):
        slot.fill_(index + 1)
    assert bucket.buffer.tolist() == [1.0] * 96 + [2.0] * 15 + [3.0] * 4
