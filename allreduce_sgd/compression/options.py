"""The options of gradient compression."""

from dataclasses import dataclass

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.options import option

__all__ = ["CODECS", "CompressionOptions"]

CODECS = ("none", "fp16", "bf16", "int8", "sign", "top-k", "random-k", "dgc", "powersgd")

_SPARSE = ("top-k", "random-k", "dgc")
# Which codecs have a use for an option.
_USERS = {
    "error_feedback": ("fp16", "bf16", "int8", "sign", "top-k", "random-k", "powersgd"),
    "compression_rank": ("powersgd",),
    "compression_ratio": _SPARSE,
    "compression_warmup_steps": _SPARSE,
    "compression_momentum": ("dgc",),
    "compression_block": ("int8", "sign"),
}


@dataclass(frozen=True)
class CompressionOptions:
    """Raises ConfigError where an option is set that the codec has no use for."""

    compression: str = option(
        "none",
        "what ranks send instead of whole gradients: fp16, bf16 (narrower floats), int8 (8 bits, stochastic rounding), "
        "sign (1 bit), top-k (the largest elements), random-k (the same random elements on all ranks), dgc (top-k with "
        "momentum correction, which replaces the optimizer's momentum), powersgd (low-rank matrices)",
        choices=CODECS,
    )
    error_feedback: bool | None = option(
        None,
        "add what a compressed gradient left out to the next one; not set: yes for sign, top-k and powersgd, no for "
        "fp16, bf16, int8 and random-k (which with it needs a low --momentum); dgc always does",
    )
    compression_rank: int | None = option(None, "rank of powersgd's matrices; not set: 2", minimum=1)
    compression_ratio: float | None = option(
        None,
        "share of the elements that top-k, random-k and dgc send; not set: 0.01, 0.25 and 0.001",
        above=0,
        maximum=1,
    )
    compression_warmup_steps: int | None = option(
        None,
        "steps over which top-k, random-k and dgc come down to their share, from 0.25 in four stages; not set: none "
        "(dgc's authors: four epochs)",
        minimum=0,
    )
    compression_momentum: float | None = option(
        None, "momentum of dgc, below 1; not set: 0.9", minimum=0, maximum=0.999999
    )
    compression_block: int | None = option(
        None, "elements that share a scale in int8 and sign, in whole eights; not set: 256", minimum=8
    )

    def __post_init__(self) -> None:
        for name, users in _USERS.items():
            if getattr(self, name) is not None and self.compression not in users:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: --compression {self.compression} has no use for it, only "
                    f"{', '.join(users)}"
                )
        if self.compression_block is not None and self.compression_block % 8:
            raise ConfigError(f"--compression-block: {self.compression_block} is not a multiple of 8")
