"""How parameters are assigned to buckets, and where in memory these lie."""

import pytest
import torch
from torch import nn

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.gradients.buckets import Bucket, BucketMemory, assign, build_buckets


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


def test_buckets_fill_in_the_order_that_is_given() -> None:
    # 40 bytes close the first bucket, 80 the others: 20 + 40 bytes, 60 + 20, 120.
    assert assign(parameters(30, 5, 10, 5, 15), 40, 80, [1, 2, 4, 3, 0]) == [[1, 2], [4, 3], [0]]


def test_parameters_of_a_common_kind_share_buckets() -> None:
    mixed = parameters(5) + parameters(5, dtype=torch.bfloat16) + parameters(5)
    wide = torch.float32, torch.device("cpu")
    assert assign(mixed, 1000, 1000) == [[1], [2, 0]]
    assert assign(mixed, 1000, 1000, kind=lambda _: wide) == [[2, 1, 0]]
    # Sizes are those of the kind: 20 bytes each.
    assert assign(mixed, 40, 40, kind=lambda _: wide) == [[2, 1], [0]]


@pytest.mark.parametrize("spacing", [1, 4, 64])
def test_slots_begin_at_multiples_of_the_spacing(spacing: int) -> None:
    buffer = torch.arange(200.0)
    bucket = Bucket(parameters(3, 0, 65, 1), buffer, spacing)
    starts = {1: [0, 3, 3, 68], 4: [0, 4, 4, 72], 64: [0, 64, 64, 192]}[spacing]
    assert bucket.starts == starts
    for slot, start, numel in zip(bucket.slots, starts, (3, 0, 65, 1), strict=True):
        assert torch.equal(slot, buffer[start : start + numel])


def test_the_memory_of_buckets_is_cut_side_by_side_on_cache_lines_and_used_again() -> None:
    memory = BucketMemory(SingleCommunicator())
    single, double = (torch.float32, torch.device("cpu")), (torch.float64, torch.device("cpu"))
    first = memory.cut([(single, 5), (double, 3), (single, 17), (double, 9)])
    assert [(one.dtype, one.numel()) for one in first] == [
        (torch.float32, 5),
        (torch.float64, 3),
        (torch.float32, 17),
        (torch.float64, 9),
    ]
    # 16 or 8 elements make a cache line of 64 bytes.
    assert first[2].data_ptr() == first[0].data_ptr() + 64
    assert first[3].data_ptr() == first[1].data_ptr() + 64
    second = memory.cut([(single, 17), (single, 5)])
    assert second[0].data_ptr() == first[0].data_ptr()
    assert second[1].data_ptr() == first[0].data_ptr() + 128


def test_more_memory_is_taken_where_it_does_not_suffice() -> None:
    memory = BucketMemory(SingleCommunicator())
    kind = torch.float32, torch.device("cpu")
    (small,) = memory.cut([(kind, 5)])
    small.fill_(1)
    (large,) = memory.cut([(kind, 100_000)])
    assert large.numel() == 100_000
    assert not large.any()
    assert small.tolist() == [1.0] * 5
