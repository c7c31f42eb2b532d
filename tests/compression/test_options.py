"""From the options to codecs: what each makes, and what is refused."""

from typing import Any

import pytest
import torch

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.base import Codec, drive
from allreduce_sgd.compression.build import build_codec
from allreduce_sgd.compression.error_feedback import ErrorFeedback
from allreduce_sgd.compression.options import CODECS, CompressionOptions
from allreduce_sgd.errors import ConfigError
from tests.compression.codecs import randn

SLOTS = [torch.empty(20, 30), torch.empty(400)]


def build(seed: int = 0, rank: int = 0, **options: Any) -> Codec:
    factory = build_codec(CompressionOptions(**options), seed=seed, rank=rank, size=1)
    assert factory is not None
    return factory(SLOTS)


def sent_by(codec: Codec) -> torch.Tensor:
    return drive(codec.reduce(randn(1000, 0), SingleCommunicator()))[0]


def test_none_is_no_codec() -> None:
    assert build_codec(CompressionOptions(), seed=0, rank=0, size=1) is None


@pytest.mark.parametrize("name", [name for name in CODECS if name != "none"])
def test_every_name_makes_a_codec_with_its_own_habit_of_feedback(name: str) -> None:
    habit = name in ("sign", "top-k", "powersgd")
    codec = build(compression=name)
    assert isinstance(codec, ErrorFeedback) == habit
    assert sent_by(codec).isfinite().all()
    if name != "dgc":
        assert isinstance(build(compression=name, error_feedback=True), ErrorFeedback)
        assert not isinstance(build(compression=name, error_feedback=False), ErrorFeedback)


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"compression": "top-k"}, 10),
        ({"compression": "top-k", "compression_ratio": 0.2}, 200),
        ({"compression": "top-k", "compression_warmup_steps": 4}, 250),
        ({"compression": "random-k"}, 250),
        ({"compression": "dgc"}, 1),
        ({"compression": "dgc", "compression_ratio": 0.05}, 50),
    ],
)
def test_sparsifiers_send_their_share(options: dict[str, Any], sent: int) -> None:
    assert int((sent_by(build(**options)) != 0).sum()) == sent


def test_the_rank_of_matrices() -> None:
    for given, expected in ((None, 2), (3, 3)):
        u = sent_by(build(compression="powersgd", compression_rank=given))
        assert torch.linalg.matrix_rank(u[:600].view(20, 30)) == expected


def test_the_block_of_a_scale() -> None:
    magnitudes = sent_by(build(compression="sign", compression_block=8)).abs()
    assert len(magnitudes.unique()) == 125
    assert len(sent_by(build(compression="sign")).abs().unique()) == 4


def test_the_momentum_of_dgc() -> None:
    codec = build(compression="dgc", compression_momentum=0.5, compression_ratio=1.0)
    signal = torch.ones(1000)
    # All is sent, and velocity is cleared with it.
    for _ in range(2):
        assert torch.equal(drive(codec.reduce(signal, SingleCommunicator()))[0], signal)
    codec = build(compression="dgc", compression_momentum=0.5)
    drive(codec.reduce(signal, SingleCommunicator()))
    assert codec.state_dict()["velocity"].sum() == 999
    drive(codec.reduce(signal, SingleCommunicator()))
    assert codec.state_dict()["velocity"].max() == 1.5


def test_seeds_are_shared_by_ranks_where_they_must_be_and_not_where_they_must_not() -> None:
    def draw(name: str, **where: int) -> torch.Tensor:
        return sent_by(build(compression=name, **where)).clone()

    for name in ("random-k", "powersgd"):
        assert torch.equal(draw(name, rank=0), draw(name, rank=1))
        assert not torch.equal(draw(name, seed=0), draw(name, seed=1))
    assert not torch.equal(draw("int8", rank=0), draw("int8", rank=1))
    assert torch.equal(draw("int8", rank=1), draw("int8", rank=1))


def test_how_many_collectives_follow_one_another() -> None:
    def rounds(name: str, size: int) -> int:
        factory = build_codec(CompressionOptions(name), seed=0, rank=0, size=size)
        assert factory is not None
        return factory(SLOTS).rounds

    for name in ("fp16", "bf16", "int8", "sign"):
        assert [rounds(name, size) for size in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert {name: rounds(name, 2) for name in ("top-k", "random-k", "dgc", "powersgd")} == {
        "top-k": 1,
        "random-k": 1,
        "dgc": 1,
        "powersgd": 2,
    }


def test_buckets_draw_differently() -> None:
    factory = build_codec(CompressionOptions(compression="random-k"), seed=0, rank=0, size=1)
    assert factory is not None
    first, second = (sent_by(factory(SLOTS)).clone() for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_feedback": True}, "--error-feedback: --compression none has no use"),
        ({"error_feedback": False, "compression": "dgc"}, "--error-feedback: --compression dgc has no use"),
        ({"compression_rank": 2, "compression": "sign"}, "--compression-rank: .*only powersgd"),
        ({"compression_ratio": 0.5, "compression": "fp16"}, "--compression-ratio: .*only top-k, random-k, dgc"),
        ({"compression_warmup_steps": 5, "compression": "powersgd"}, "--compression-warmup-steps: "),
        ({"compression_momentum": 0.5, "compression": "top-k"}, "--compression-momentum: .*only dgc"),
        ({"compression_block": 64, "compression": "bf16"}, "--compression-block: .*only int8, sign"),
        ({"compression_block": 12, "compression": "sign"}, "--compression-block: 12 is not a multiple of 8"),
    ],
)
def test_an_option_without_a_use_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        CompressionOptions(**options)
    assert "\n" not in str(raised.value)


def test_complex_parameters_are_refused() -> None:
    factory = build_codec(CompressionOptions(compression="bf16"), seed=0, rank=0, size=1)
    assert factory is not None
    with pytest.raises(ConfigError, match=r"--compression bf16: .*torch.complex64.*choose none"):
        factory([torch.empty(3, dtype=torch.complex64)])
