"""Computing times where nothing was measured: other batch sizes of a measured model, and mlps of other widths.

Another batch size b of a measured model: each phase takes fixed + b · per sample, both at least 0, fitted to all
measured batch sizes; with one measured size there is nothing fixed. Between two measured sizes the line between them.

Another width: forward and backward of a fully connected model with N parameters take

    c_0 + c_1 · b N + c_2 · N        calls, multiplications, reading each weight once,

and the optimizer c_0 + c_2 · N. Coefficients of least squared relative error, none below 0, over all measured mlps.
When gradients arrive within the backward pass is taken over from the measured mlp whose size is nearest.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from allreduce_sgd.errors import ConfigError
from benchmarks.scaling.profile import Compute
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["can_model", "compute_at", "compute_like", "workload"]

_FEWEST_MLPS = 3
_PHASES = ("forward_seconds", "backward_seconds", "optimizer_seconds")


def workload(name: str) -> Workload:
    """Return a workload by name: those of `workloads`, mlpW-bB (two hidden layers of W) and cnn-bB for any W and B.

    Raises ConfigError for another name.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    match = re.fullmatch(r"(?:mlp([1-9]\d{0,4})|cnn)-b([1-9]\d{0,5})", name)
    if match is None:
        raise ConfigError(f"unknown workload {name!r}; choose mlpW-bB or cnn-bB, such as mlp1024-b32")
    like = WORKLOADS["cnn-b64" if match[1] is None else "mlp512-b64"]
    hidden = None if match[1] is None else (int(match[1]),) * 2
    return replace(like, batch_size=int(match[2]), hidden=hidden)


def compute_at(computes: Sequence[Compute], model: str, batch_size: float) -> Compute:
    """Return the computing of a measured model at any batch size. Raises ConfigError for one not measured."""
    mine = sorted((each for each in computes if each.model == model), key=lambda each: each.batch_size)
    if not mine:
        known = ", ".join(dict.fromkeys(each.model for each in computes))
        raise ConfigError(f"the profile has no measurements of {model}; it has {known}")
    sizes = [float(each.batch_size) for each in mine]

    def of_phase(seconds: Sequence[float]) -> float:
        if sizes[0] <= batch_size <= sizes[-1]:
            return float(np.interp(batch_size, sizes, seconds))
        if len(sizes) == 1:
            return seconds[0] * batch_size / sizes[0]
        return _fitted([[1.0, size] for size in sizes], seconds, [1.0, batch_size])

    nearest = min(mine, key=lambda each: abs(np.log(each.batch_size / batch_size)))
    name = f"{model}-b{round(batch_size)}"
    return _scaled(nearest, name, round(batch_size), lambda phase: of_phase([getattr(each, phase) for each in mine]))


def compute_like(computes: Sequence[Compute], name: str, parameter_bytes: tuple[int, ...]) -> Compute:
    """Return the computing of workload `name` as expected from other ones: never from a measurement of itself.

    From other batch sizes of the same model where two are there, or else from other mlps. Raises ConfigError where
    neither is possible.
    """
    others = [each for each in computes if each.workload != name]
    if not can_model(name, [each.workload for each in others]):
        raise ConfigError(
            f"{name} cannot be modelled: it takes two other batch sizes of {_model(name)}, or for an mlp "
            f"{_FEWEST_MLPS} other mlps"
        )
    size, model = workload(name).batch_size, _model(name)
    if _batches(model, [each.workload for each in others]) > 1:
        return compute_at(others, model, size)
    mlps = [each for each in others if each.model.startswith("mlp")]
    total = sum(parameter_bytes)
    nearest = min(mlps, key=lambda each: abs(np.log(each.total_bytes / total)) + 1e-3 * abs(each.batch_size - size))

    def of_phase(phase: str) -> float:
        def features(batch: int, n_bytes: int) -> list[float]:
            known = [1.0, float(n_bytes)]
            return known if phase == "optimizer_seconds" else [*known, float(batch) * n_bytes]

        rows = [features(each.batch_size, each.total_bytes) for each in mlps]
        return _fitted(rows, [getattr(each, phase) for each in mlps], features(size, total))

    return replace(_scaled(nearest, name, size, of_phase), parameter_bytes=parameter_bytes)


def can_model(name: str, others: Sequence[str]) -> bool:
    """Say whether the computing of workload `name` can be modelled from those of `others`, its own not counted."""
    usable = {each for each in others if each != name}
    if _batches(_model(name), usable) > 1:
        return True
    return name.startswith("mlp") and sum(each.startswith("mlp") for each in usable) >= _FEWEST_MLPS


def _model(name: str) -> str:
    return name.rpartition("-b")[0]


def _batches(model: str, names: Collection[str]) -> int:
    return sum(_model(each) == model for each in names)


def _scaled(like: Compute, name: str, batch_size: int, of_phase: Callable[[str], float]) -> Compute:
    forward, backward, optimizer = map(of_phase, _PHASES)
    stretch = backward / like.backward_seconds
    return Compute(
        name,
        batch_size,
        like.parameter_bytes,
        forward,
        backward,
        optimizer,
        tuple(stretch * seconds for seconds in like.arrival_seconds),
        like.contention,
    )


def _fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float], wanted: Sequence[float]) -> float:
    """Return what coefficients of at least 0 and of least squared relative error give for the features `wanted`."""
    scale = np.abs(np.array(rows)).max(axis=0)
    known = np.array(rows) / scale / np.array(seconds)[:, None]
    coefficients, _ = nnls(known, np.ones(len(seconds)))
    return float(coefficients @ (np.array(wanted) / scale))
