"""Random numbers that depend on a few whole numbers only, so that there is no generator's state to save.

Ranks that give the same numbers draw the same, so that what follows from them need not be sent.
"""

import hashlib

import torch

__all__ = ["reseed"]


def reseed(generator: torch.Generator, *numbers: int) -> None:
    """Let the generator start anew at a place that all the numbers together determine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4)
    # More than 32 bits would be dropped: that is what the Mersenne Twister of the CPU takes.
    generator.manual_seed(int.from_bytes(digest.digest(), "little"))
