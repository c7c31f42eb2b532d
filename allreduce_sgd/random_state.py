"""The states of all random generators of a process, in types that a checkpoint may hold."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "restore_random_state", "seed_generators"]


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of torch's (CPU and `device`), Python's and numpy's global generators."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.tensor(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set all generators as `random_state` found them."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_generators(*numbers: int) -> None:
    """Seed torch's (all devices), Python's and numpy's global generators from the numbers, whose order counts."""
    # Hashed, so that what neighbouring numbers give is unrelated.
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "big")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
