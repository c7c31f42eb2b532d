"""Random buffers, one per rank."""

import numpy as np
import numpy.typing as npt

__all__ = ["integers", "wide_floats"]


def integers(size: int, length: int) -> list[npt.NDArray[np.int64]]:
    """Return int64 buffers of shape (length,), whose sums are exact in any order."""
    generator = np.random.default_rng(1000 * size + length)
    return [generator.integers(-(2**40), 2**40, length) for _ in range(size)]


def wide_floats(size: int, length: int) -> list[npt.NDArray[np.float32]]:
    """Return float32 buffers of shape (length,), of so different sizes that the order of a sum shows in its bits."""
    generator = np.random.default_rng(1000 * size + length)
    values = generator.standard_normal((size, length)) * 10.0 ** generator.integers(-3, 4, (size, length))
    return list(values.astype(np.float32))
