"""What holds for every codec, over one rank: the laws of `Codec` and of error feedback, and saved states."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.base import Codec, drive, is_finite
from allreduce_sgd.compression.density import Density
from allreduce_sgd.compression.dgc import DeepGradientCompression
from allreduce_sgd.compression.error_feedback import ErrorFeedback
from allreduce_sgd.compression.identity import Identity
from tests.compression.codecs import CASES, DGC, FLOATS, Case, assert_law, randn

LENGTHS = [0, 1, 2, 7, 8, 63, 64, 65, 1000, 9001]


def step(codec: Codec, signal: Tensor) -> tuple[Tensor, Tensor]:
    return drive(codec.reduce(signal, SingleCommunicator()))


def reloaded(state: dict[str, object]) -> dict[str, object]:
    """What a checkpoint makes of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [*CASES, DGC], ids=lambda case: case.name)
def test_u_is_what_one_rank_alone_sent_and_the_signal_stays(case: Case, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        codec = case.make(length, 0)
        for turn in range(3):
            signal = randn(length, turn, dtype)
            before = signal.clone()
            u, sent = step(codec, signal)
            assert torch.equal(signal, before)
            assert u.shape == sent.shape == signal.shape
            assert u.dtype is sent.dtype is dtype
            assert torch.equal(u, sent)
            if length:
                assert u.data_ptr() not in (sent.data_ptr(), signal.data_ptr())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_sent_and_what_is_kept_make_the_gradient_and_what_was_kept(case: Case, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        codec = ErrorFeedback(case.make(length, 0))
        old = torch.zeros(length, dtype=dtype)
        for turn in range(8):
            signal = randn(length, turn, dtype)
            _, sent = step(codec, signal)
            assert codec.residual is not None
            assert_law(sent, codec.residual, signal + old, case.exact)
            old = codec.residual.clone()


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100), min_size=1))
def test_the_law_holds_for_any_numbers(values: list[float]) -> None:
    signal = torch.tensor(values)
    for case in CASES:
        codec = ErrorFeedback(case.make(len(values), 0))
        u, sent = step(codec, signal)
        if not is_finite(u):
            # Only float16 has a range smaller than that of what it is given.
            assert case.name == "fp16"
            assert float(signal.abs().max()) > 65504
            continue
        assert codec.residual is not None
        assert_law(sent, codec.residual, signal, case.exact)


@pytest.mark.parametrize("case", [*CASES, DGC], ids=lambda case: case.name)
def test_a_saved_state_goes_on_bit_for_bit(case: Case) -> None:
    length = 700

    def make() -> Codec:
        return case.make(length, 0) if case is DGC else ErrorFeedback(case.make(length, 0))

    never_stepped = make()
    restored = make()
    restored.load_state_dict(reloaded(never_stepped.state_dict()))
    original = make()
    for turn in range(9):
        if turn in (0, 4):
            restored = make()
            restored.load_state_dict(reloaded(original.state_dict()))
        results = [step(codec, randn(length, turn)) for codec in (original, restored)]
        for left, right in zip(*results, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("case", [*CASES, DGC], ids=lambda case: case.name)
def test_a_loaded_state_is_a_copy(case: Case) -> None:
    codecs = [ErrorFeedback(case.make(100, 0)), ErrorFeedback(case.make(100, 0))]
    step(codecs[0], randn(100, 0))
    saved = codecs[0].state_dict()
    kept = copy.deepcopy(saved)
    codecs[1].load_state_dict(saved)
    step(codecs[1], randn(100, 1))
    assert repr(saved) == repr(kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", [*CASES, DGC], ids=lambda case: case.name)
def test_what_is_not_finite_shows_and_is_not_kept(case: Case, bad: float) -> None:
    length = 300
    for position in (0, 57, 128, length - 1):
        codec = case.make(length, 0) if case is DGC else ErrorFeedback(case.make(length, 0))
        step(codec, randn(length, 0))
        before = copy.deepcopy(codec.state_dict())
        signal = randn(length, 1)
        signal[position] = bad
        u, _ = step(codec, signal)
        assert not is_finite(u)
        after = codec.state_dict()
        for name in ("residual", "velocity", "unsent"):
            if name in before:
                assert torch.equal(before[name], after[name])
        u, _ = step(codec, randn(length, 2))
        assert is_finite(u)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", [*CASES, DGC], ids=lambda case: case.name)
def test_zeros_stay_zeros_and_do_no_harm(case: Case, dtype: torch.dtype) -> None:
    codec = ErrorFeedback(case.make(500, 0))
    for _ in range(3):
        u, sent = step(codec, torch.zeros(500, dtype=dtype))
        assert torch.equal(u, torch.zeros_like(u))
        assert torch.equal(sent, u)
    u, _ = step(codec, randn(500, 0, dtype))
    assert is_finite(u)
    assert float(u.abs().max()) > 0


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "identity"] + [DGC], ids=lambda case: case.name
)
def test_feedback_sends_everything_in_the_end(case: Case) -> None:
    # What is sent over many steps differs from what was to be sent only by what is still kept, which stays bounded.
    codec = DeepGradientCompression(Density(0.05), momentum=0) if case is DGC else ErrorFeedback(case.make(400, 0))
    signal = randn(400, 0)
    total = torch.zeros(400)
    for _ in range(1000):
        u, _ = step(codec, signal)
        total += u
    torch.testing.assert_close(total / 1000, signal, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("case", [*CASES, DGC], ids=lambda case: case.name)
def test_a_new_scale_of_the_signals_rescales_what_is_kept(case: Case) -> None:
    # A power of two changes no digit, so that the scaled run is the other one times that power.
    codecs = [case.make(256, 0) if case is DGC else ErrorFeedback(case.make(256, 0)) for _ in range(2)]
    for turn in range(6):
        if turn == 3:
            codecs[1].rescale_(0.25)
        scale = 1.0 if turn < 3 else 0.25
        plain, _ = step(codecs[0], randn(256, turn))
        scaled, _ = step(codecs[1], scale * randn(256, turn))
        # float16 has fewer digits below 6e-5.
        rtol, atol = (1e-3, 1e-7) if case.name == "fp16" else (1e-5, 1e-9)
        torch.testing.assert_close(scaled, scale * plain, rtol=rtol, atol=atol)


def test_identity_is_bitwise_neutral_and_keeps_exactly_nothing() -> None:
    codec = ErrorFeedback(Identity())
    for turn in range(4):
        signal = randn(1000, turn)
        u, sent = step(codec, signal)
        assert torch.equal(u.view(torch.int32), signal.view(torch.int32))
        assert torch.equal(sent, signal)
        assert codec.residual is not None
        assert torch.equal(codec.residual, torch.zeros(1000))


def test_a_state_of_another_bucket_is_refused() -> None:
    codec = ErrorFeedback(Identity())
    step(codec, randn(10, 0))
    with pytest.raises(ValueError, match=r"residual has 10 elements.*signal 11.*another bucket"):
        step(codec, randn(11, 0))


def test_a_state_of_another_codec_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Identity keeps nothing.*step"):
        Identity().load_state_dict({"step": 3})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_is_finite_sees_every_place(bad: float) -> None:
    for length in (1, 2, 9, 1000):
        for position in {0, length // 2, length - 1}:
            tensor = torch.zeros(length)
            assert is_finite(tensor)
            tensor[position] = bad
            assert not is_finite(tensor)
    assert is_finite(torch.empty(0))
