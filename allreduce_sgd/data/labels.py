"""Labels that are written as words or numbers, and what they mean for training.

Numbers of which at least one is not whole make a regression. Otherwise every different label is a class, and classes
are numbered in sorted order: by value where all are numbers (so -1 and 1 become 0 and 1), else as text.
"""

from array import array

import numpy as np
import torch
from torch import Tensor

from allreduce_sgd.errors import ConfigError, quoted

__all__ = ["Labels", "number"]

_LARGEST = float(np.finfo(np.float32).max)
# More classes than this, and than half of the samples, are rather values.
_FEWEST_TO_DOUBT = 100


def number(text: str) -> float | None:
    """The finite number that `text` writes, which float32 can hold; None if it writes none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST and "_" not in text else None


class Labels:
    """Collects labels as they are read; `where` begins error texts."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._codes = array("q")
        # In the order in which they came first, with the line where they did.
        self._lines: dict[str, int] = {}
        self._numbers: dict[str, int] = {}

    def add(self, text: str, line: int) -> None:
        """Take the next sample's label, of this line of the file.

        Raises:
            ConfigError: it is empty.
        """
        if not text:
            raise ConfigError(f"{self._where}: line {line}: the label is empty")
        self._lines.setdefault(text, line)
        self._codes.append(self._numbers.setdefault(text, len(self._numbers)))

    def targets(self, ignore_index: int | None) -> tuple[Tensor, int | None]:
        """The targets (n,), int64 with their number of classes, at least 2, or float32 with None.

        Labels that are the number `ignore_index` keep it, and make no class.

        Raises:
            ConfigError: a number among numbers is not finite, or there are too many classes to be meant as such.
        """
        values = {text: number(text) for text in self._lines}
        numbers = [value for value in values.values() if value is not None]
        for text, value in values.items():
            if numbers and value is None and _is_not_finite(text):
                raise ConfigError(f"{self._where}: line {self._lines[text]}: the label {quoted(text)} is not finite")
        codes = torch.frombuffer(self._codes, dtype=torch.int64) if self._codes else torch.empty(0, dtype=torch.int64)
        if len(numbers) == len(values) and not all(value.is_integer() for value in numbers):
            return torch.tensor(numbers)[codes], None
        ignored = {text for text, value in values.items() if ignore_index is not None and value == ignore_index}
        keys: dict[str, float | str] = {
            text: value if len(numbers) == len(values) and value is not None else text
            for text, value in values.items()
            if text not in ignored
        }
        # Different texts may be one number.
        classes = {key: label for label, key in enumerate(sorted(set(keys.values())))}
        if len(classes) > max(_FEWEST_TO_DOUBT, len(codes) // 2):
            raise ConfigError(
                f"{self._where}: the labels of {len(codes)} samples have {len(classes)} different values, too many for "
                "classes; a regression needs a number that is not whole"
            )
        meaning = [ignore_index if text in ignored else classes[keys[text]] for text in values]
        return torch.tensor(meaning, dtype=torch.int64)[codes], max(2, len(classes))


def _is_not_finite(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
