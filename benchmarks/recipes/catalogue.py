"""All recipes by name."""

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks.recipes.batch_norm import BATCH_NORM
from benchmarks.recipes.curves import CURVES
from benchmarks.recipes.early_stopping import EARLY_STOPPING
from benchmarks.recipes.generalisation import GENERALISATION
from benchmarks.recipes.noise_ball import NOISE_BALL
from benchmarks.recipes.overfitting import OVERFITTING
from benchmarks.recipes.recipe import Recipe

__all__ = ["RECIPES"]

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "overfitting": OVERFITTING,
        "curves": CURVES,
        "generalisation": GENERALISATION,
        "batch-norm": BATCH_NORM,
        "early-stopping": EARLY_STOPPING,
        "noise-ball": NOISE_BALL,
    }
)
