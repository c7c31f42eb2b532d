"""Made-up house prices: `synthetic-housing[:SAMPLES]`, a regression with features as skewed as real ones.

They have the names, units and rough distributions of those of California's districts in 1990 (Pace and Barry 1997,
"Sparse spatial autoregressions"): income (10,000 dollars), age of the houses (years, cut off at 52), rooms and bedrooms
per household, population, persons per household, latitude and longitude (degrees). The target is the value of a house
in 100,000 dollars: it grows with income, less than in proportion, with rooms per person, and towards two cities and the
coast, multiplied by a log-normal disturbance of 20 %, and is cut off at 5 as the real ones are. So a linear model
explains some six tenths of its variance, a network more.
"""

import re

import torch
from torch import Tensor

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import refusing

__all__ = ["DEFAULT_HOUSES", "FEATURES", "load_housing"]

FEATURES = (
    "median_income",
    "house_age",
    "average_rooms",
    "average_bedrooms",
    "population",
    "average_occupancy",
    "latitude",
    "longitude",
)
DEFAULT_HOUSES = "20640"

# (latitude, longitude, spread in degrees, share of the districts)
_SOUTH = (34.0, -118.1, 0.5, 0.5)
_NORTH = (37.7, -122.1, 0.5, 0.3)
_HIGHEST_PRICE = 5.0
_OLDEST_YEARS = 52.0
_DISTURBANCE = 0.2


def load_housing(options: DataOptions, specification: str, seed: int) -> Dataset:
    """SAMPLES districts of which the last `test_fraction` are the test split: inputs (n, 8) and targets (n,) float32.

    The columns are `FEATURES`. All follow from `seed`.

    Raises:
        ConfigError: the specification is no number of at least 2, or asks for more than memory holds.
    """
    if not re.fullmatch(r"\d{1,12}", specification, re.ASCII) or int(specification) < 2:
        raise ConfigError(
            f"--dataset synthetic-housing:{specification}: expected synthetic-housing:SAMPLES as in "
            f"synthetic-housing:{DEFAULT_HOUSES}, with at least 2"
        )
    samples = int(specification)
    name = f"synthetic-housing:{specification}"
    generator = torch.Generator().manual_seed(seed)
    with refusing(f"--dataset {name}: cannot be made"):
        inputs, targets = _districts(samples, generator)
    train = samples - max(1, round(samples * options.test_fraction))
    splits = Split(inputs[:train], targets[:train]), Split(inputs[train:], targets[train:])
    return Dataset(name, *splits, (len(FEATURES),), None)


def _districts(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    income_normal, rooms, bedrooms, people, persons, north, east, noise = torch.randn(8, samples, generator=generator)
    age, where = torch.rand(2, samples, generator=generator)
    income = (1.26 + 0.46 * income_normal).exp().clamp(0.5, 15.0)
    years = (1 + 55 * age).clamp(max=_OLDEST_YEARS)
    rooms_each = (1.63 + 0.18 * income_normal + 0.2 * rooms).exp()
    bedrooms_each = (0.07 + 0.12 * rooms + 0.08 * bedrooms).exp()
    population = (7.06 + 0.7 * people).exp().clamp(3.0, 36_000.0)
    occupancy = (1.05 - 0.06 * income_normal + 0.22 * persons).exp()
    # A valley for those of neither city, along a line between them.
    along = torch.rand(samples, generator=generator)
    latitude, longitude = 34.5 + 5 * along + 0.4 * north, -118.2 - 3 * along + 0.5 * east
    for first, (centre_north, centre_east, spread, share) in ((0.0, _SOUTH), (_SOUTH[3], _NORTH)):
        there = (where >= first) & (where < first + share)
        latitude = torch.where(there, centre_north + spread * north, latitude)
        longitude = torch.where(there, centre_east + spread * east, longitude)
    nearness = sum(
        weight * (-((latitude - city[0]).square() + (longitude - city[1]).square()).sqrt() / 0.3).exp()
        for weight, city in ((0.8, _SOUTH), (1.2, _NORTH))
    )
    # The coast runs from (33, -117.3) to (39, -123.7); positive is inland.
    inland = ((longitude + 117.3) * 6 + (latitude - 33) * 6.4) / (6**2 + 6.4**2) ** 0.5
    logarithm = -0.68 + 0.65 * income.log() + nearness + 0.35 * torch.sigmoid(-2 * (inland - 0.4))
    logarithm = logarithm + 0.25 * (rooms_each / occupancy).log() + 0.004 * (years - 28)
    value = (logarithm + _DISTURBANCE * noise).exp().clamp(0.15, _HIGHEST_PRICE)
    return torch.stack([income, years, rooms_each, bedrooms_each, population, occupancy, latitude, longitude], 1), value
