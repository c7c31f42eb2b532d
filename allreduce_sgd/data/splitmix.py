"""Random numbers by position: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) asked for its n-th output.

Its state is a counter, so that any output can be computed without those before it, for many streams at once. A number
thus belongs to what its key and stream name, whoever computes it and in whichever order.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["key_of", "random_bits", "random_integers"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key_of(*numbers: int | str) -> int:
    """64 bits made of `numbers`, such that any other ones give unrelated bits."""
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def random_bits(seeds: NDArray[np.uint64], position: int) -> NDArray[np.uint64]:
    """Of each generator that began with one of `seeds` (n,), the output at `position` (0 is the first): (n,)."""
    with np.errstate(over="ignore"):
        z = seeds + _GOLDEN * np.uint64(position + 1)
    # Arrays, unlike single numbers, overflow without a warning.
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_integers(key: int, streams: NDArray[np.int64], limits: tuple[int, ...]) -> NDArray[np.int64]:
    """For each of `streams` (n,) as many integers as there are `limits`, 0 to limit - 1: (len(limits), n).

    A limit below 2^32 is met without division, after Lemire 2019 (arXiv 1805.10941); its bias is at most limit / 2^32.
    """
    # Streams are neighbouring numbers, which as seeds would give shifted copies of one sequence.
    seeds = random_bits(streams.astype(np.uint64) * _GOLDEN ^ np.uint64(key), 0)
    drawn = [
        (random_bits(seeds, position) >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)
        for position, limit in enumerate(limits)
    ]
    return np.stack(drawn).astype(np.int64)
