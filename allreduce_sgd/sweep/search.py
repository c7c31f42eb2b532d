"""Which combinations of values are tried: all of a grid, random ones, or by successive halving ever fewer for longer.

Random search: Bergstra and Bengio 2012 (JMLR 13). Successive halving: Karnin, Koren and Somekh 2013 (ICML), for
hyper-parameters Jamieson and Talwalkar 2016 (arXiv 1502.07943). All trials of a rung are waited for, unlike in its
asynchronous form (ASHA, Li et al. 2018, arXiv 1810.05934), so that which trials go on does not depend on the machine's
load; near the end of a rung some ranks have nothing to do.

Optuna has samplers and pruners for all of these. What is needed of them are the lines below, and it would bring
SQLAlchemy and alembic into the environment; its studies do not keep the state of a sampler, so that a sweep which was
killed would go on with other trials than an undisturbed one; and its halving is the asynchronous form.
"""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.sweep.spec import Halving, Spec, Value

__all__ = ["Trial", "all_trials", "promoted", "rungs"]

_VAIN_DRAWS = 10_000


@dataclass(frozen=True)
class Trial:
    """A combination of values, by flag; `number` counts from 0 in the order of the search."""

    number: int
    parameters: Mapping[str, Value]


def all_trials(spec: Spec) -> tuple[Trial, ...]:
    """Return the trials, which follow from the spec alone. The last parameter of a grid changes fastest."""
    names = [each.name for each in spec.parameters]
    if spec.trials is None:
        choices = (each.values or tuple(range(int(each.low), int(each.high) + 1)) for each in spec.parameters)
        combinations = list(itertools.product(*choices))
    else:
        combinations = _random(spec, spec.trials)
    return tuple(Trial(number, dict(zip(names, values, strict=True))) for number, values in enumerate(combinations))


def _random(spec: Spec, number: int) -> list[tuple[Value, ...]]:
    """Return different combinations, independently and, where it is a range, uniformly drawn."""
    # Of all its methods only this one promises the same numbers in every version of Python.
    draw = random.Random(spec.seed).random
    found: dict[tuple[Value, ...], None] = {}
    vain = 0
    while len(found) < number:
        before = len(found)
        found.setdefault(tuple(each.at(draw()) for each in spec.parameters))
        vain = 0 if len(found) > before else vain + 1
        if vain == _VAIN_DRAWS:
            raise ConfigError(f"trials: {number}: no more than {before} different combinations could be drawn")
    return list(found)


def rungs(halving: Halving) -> tuple[int, ...]:
    """Return how far the trials of each rung train, in epochs or steps, from the beginning: by factors of eta."""
    found = []
    reach = halving.smallest
    while reach < halving.largest:
        found.append(reach)
        reach *= halving.eta
    return (*found, halving.largest)


def promoted(values: Mapping[int, float | None], eta: int, goal: str) -> list[int]:
    """Return the ceil(n / eta) best of n trials, by number, best first; of equals the earlier ones.

    Those without a value, which have failed, are never among them.
    """
    sign = -1 if goal == "max" else 1
    ranked = sorted((sign * value, number) for number, value in values.items() if value is not None)
    return [number for _, number in ranked[: -(-len(values) // eta)]]
