"""One bit per element: packed bits and scales, by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.base import drive
from allreduce_sgd.compression.bits import pack, unpack
from allreduce_sgd.compression.quantized import Quantized
from allreduce_sgd.compression.sign import Sign


def test_signs_with_the_mean_magnitude_of_their_block() -> None:
    # 20 elements in blocks of at most 8: three blocks of 8, the last one with four elements and four of padding.
    signal = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, *[0.5] * 8, -1, 0, -1, 2])
    u, _ = drive(Quantized(Sign(8)).reduce(signal, SingleCommunicator()))
    assert u.tolist() == [4.5, -4.5] * 4 + [0.5] * 8 + [-1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 9])
def test_padding_does_not_dilute_the_scale(length: int) -> None:
    u, _ = drive(Quantized(Sign()).reduce(torch.full((length,), -3.0), SingleCommunicator()))
    assert u.tolist() == [-3.0] * length


def test_a_row_is_scales_and_bits() -> None:
    sign = Sign(1024)
    assert sign.row(1024) == (1024, 4 + 128)
    assert sign.row(1025) == (2 * 520, 2 * 4 + 132)
    assert sign.row(1) == (8, 8)
    wire = torch.zeros(1, 8, dtype=torch.uint8)
    sign.encode(torch.tensor([[1.0, -1, -1, 1, 1, 1, 1, -7]]), wire, 8)
    assert wire[0, :4].view(torch.float32).item() == 14 / 8
    assert wire[0, 4].item() == 0b10011110


@given(st.lists(st.lists(st.floats(width=32), min_size=16, max_size=16), min_size=1, max_size=5))
def test_bits_come_back(rows: list[list[float]]) -> None:
    values = torch.tensor(rows)
    packed = torch.empty(len(rows), 2, dtype=torch.uint8)
    pack(values, packed)
    assert np.array_equal(packed.numpy(), np.packbits(np.array(rows, dtype=np.float32) >= 0, axis=1))
    back = torch.full_like(values, 7.0)
    unpack(packed, back)
    assert back.tolist() == (values >= 0).float().tolist()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_packs_the_same_bits() -> None:
    values = torch.randn(5, 64)
    here, there = torch.empty(5, 8, dtype=torch.uint8), torch.empty(5, 8, dtype=torch.uint8, device="cuda")
    pack(values, here)
    pack(values.cuda(), there)
    assert torch.equal(here, there.cpu())
    back = torch.empty(5, 64, device="cuda")
    unpack(there, back)
    assert torch.equal(back.cpu(), (values >= 0).float())
