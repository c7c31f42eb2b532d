"""The codecs that predictions know: bytes sent for each byte of a float32 gradient, by the definition of their formats.

fp16 and bf16 have half; int8 a quarter and sign a 32nd, with a scale of 4 bytes for every 256 elements: they are sent
in the two phases of `compression.quantized`. top-k sends a value and an index, 8 bytes, for one element
in a hundred, and these are gathered from all ranks. What encoding and decoding takes is the profile's where `measure`
timed it; elsewhere it is what the user says, or left out.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from benchmarks.scaling.profile import Profile
from benchmarks.scaling.stepping import NO_CODEC, Codec

__all__ = ["CODEC_NAMES", "codec_of"]

_FORMS: Mapping[str, tuple[float, Literal["two phases", "gather"]]] = MappingProxyType(
    {
        "fp16": (1 / 2, "two phases"),
        "bf16": (1 / 2, "two phases"),
        "int8": (1 / 4 + 1 / 256, "two phases"),
        "sign": (1 / 32 + 1 / 256, "two phases"),
        "top-k": (2 / 100, "gather"),
    }
)
CODEC_NAMES = ("none", *_FORMS)


def codec_of(name: str, profile: Profile, nanoseconds_per_byte: float | None) -> Codec:
    """Return the codec; a time that is given counts before one that was measured."""
    if name == "none":
        return NO_CODEC
    ratio, exchange = _FORMS[name]
    timed = dict(profile.codec_seconds_per_byte)
    if nanoseconds_per_byte is not None:
        return Codec(name, ratio, 1e-9 * nanoseconds_per_byte, exchange)
    return Codec(name, ratio, timed.get(name, 0.0), exchange, measured=name in timed)
