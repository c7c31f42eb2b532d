"""The weights of classes, as numbers or to balance them.

`balanced` weights are those that scikit-learn computes, after King and Zeng 2001 ("Logistic Regression in Rare Events
Data"): N / (K n_c) for the n_c of N labels that are c, of K classes that occur at all. A class that does not occur in
the training set gets the weight 0 (scikit-learn gives it none).
"""

import math
from collections.abc import Sequence

from allreduce_sgd.errors import ConfigError

__all__ = ["parse_class_weights"]


def parse_class_weights(text: str, counts: Sequence[int]) -> tuple[float, ...]:
    """The weight of each class, of which the training set has `counts`.

    Raises:
        ConfigError: `text` is neither "balanced" nor a number of at least 0 for each class.
    """
    if text.lower() == "balanced":
        occurring = sum(count > 0 for count in counts)
        return tuple(sum(counts) / (occurring * count) if count else 0.0 for count in counts)
    weights = []
    for part in text.split(","):
        try:
            weights.append(float(part))
        except ValueError:
            weights.append(math.nan)
    if len(weights) != len(counts) or not all(0 <= weight < math.inf for weight in weights):
        raise ConfigError(
            f"--class-weights {text}: expected balanced, or {len(counts)} numbers of at least 0 separated by commas, "
            "one for each class"
        )
    return tuple(weights)
