import pytest
import torch
from torch import Tensor

from allreduce_sgd.schedules.step import chunk
from benchmarks.collective_data import DTYPES, OPERATIONS, CollectiveData, bus_factor

NUMEL = 1001


def perform(operation: str, inputs: list[Tensor]) -> list[Tensor]:
    """Return what each rank has after the collective, reduced in the order of ranks and in the inputs' own dtype."""
    size = len(inputs)
    if operation == "broadcast":
        return [inputs[0].clone() for _ in inputs]
    if operation == "all_gather":
        gathered = torch.cat([buffer[chunk(NUMEL, size, rank)] for rank, buffer in enumerate(inputs)])
        return [gathered.clone() for _ in inputs]
    total = inputs[0].clone()
    for buffer in inputs[1:]:
        total += buffer
    if operation == "all_reduce":
        return [total.clone() for _ in inputs]
    results = []
    for rank, buffer in enumerate(inputs):
        result = buffer.clone()
        result[chunk(NUMEL, size, rank)] = total[chunk(NUMEL, size, rank)]
        results.append(result)
    return results


def filled(ranks: list[CollectiveData], dtype: torch.dtype, index: int) -> list[Tensor]:
    buffers = [torch.zeros(NUMEL, dtype=dtype) for _ in ranks]
    for data, buffer in zip(ranks, buffers, strict=True):
        data.fill(buffer, index)
    return buffers


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_the_right_result_has_no_wrong_element_in_any_dtype(operation: str, dtype: torch.dtype) -> None:
    ranks = [CollectiveData(operation, rank, 3, NUMEL, dtype) for rank in range(3)]
    for index in (0, 1, 24):
        results = perform(operation, filled(ranks, dtype, index))
        assert [data.count_wrong(got, data.region(NUMEL), index) for data, got in zip(ranks, results, strict=True)] == [
            0,
            0,
            0,
        ]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_inputs_left_alone_and_results_of_another_round_are_wrong(operation: str) -> None:
    ranks = [CollectiveData(operation, rank, 2, NUMEL, torch.float32) for rank in range(2)]
    inputs = filled(ranks, torch.float32, 3)
    stale = perform(operation, filled(ranks, torch.float32, 2))
    # Rank 0 is the root of a broadcast, whose input is the result.
    data, buffer = ranks[1], inputs[1]
    defined = data.region(NUMEL)
    length = defined.stop - defined.start
    own_part = length // 2 if operation == "all_gather" else 0
    assert data.count_wrong(buffer, defined, 3) > 0.9 * (length - own_part)
    assert data.count_wrong(stale[1], defined, 3) > 0.9 * length


def test_every_wrong_element_is_counted() -> None:
    ranks = [CollectiveData("all_reduce", rank, 2, NUMEL, torch.int32) for rank in range(2)]
    result = perform("all_reduce", filled(ranks, torch.int32, 0))[0]
    result[[0, 500, NUMEL - 1]] += 1
    assert ranks[0].count_wrong(result, slice(0, NUMEL), 0) == 3


def test_the_bus_factors_are_those_of_nccl_tests() -> None:
    factors = {operation: [bus_factor(operation, ranks) for ranks in (2, 4)] for operation in OPERATIONS}
    assert factors == {
        "all_reduce": [1.0, 1.5],
        "reduce_scatter": [0.5, 0.75],
        "all_gather": [0.5, 0.75],
        "broadcast": [1.0, 1.0],
    }
