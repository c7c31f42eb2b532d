"""Whether a saved state is one that an optimizer could have: torch's own `load_state_dict` takes any that has its keys.

What state an optimizer keeps is known to it alone, so it is asked: another of its kind takes a step with a parameter of
the same shape, and what it then has is compared. Values are not judged, except those that would end in an error.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.errors import quoted
from allreduce_sgd.optim.build import needs_closure

__all__ = ["check_state"]


def check_state(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], parameters: Sequence[Tensor] | None = None
) -> None:
    """Raise ValueError, which names the entry, where `saved` is no state of such an optimizer with its options.

    `parameters` are those that the state is of, in the order of the groups; None: the optimizer's own. Takes the memory
    of the largest parameter and its state, for a moment.
    """
    if parameters is None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
    groups = _checked_groups(optimizer, saved["param_groups"], len(parameters))
    samples: dict[Any, Mapping[str, Any]] = {}
    for number, entries in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise ValueError(f"the optimizer's state is of a parameter {quoted(number)} of {len(parameters)}")
        if not entries:
            # It has had no gradient yet.
            continue
        several = needs_closure(optimizer)
        together = list(parameters) if several else [parameters[number]]
        kind = groups[number], *((one.shape, one.dtype) for one in together)
        if kind not in samples:
            samples[kind] = _sample(optimizer, optimizer.param_groups[groups[number]], together)
        sample = samples[kind]
        # What LBFGS keeps comes one by one, with its first iterations.
        if not set(entries) <= set(sample) or (not several and len(entries) < len(sample)):
            raise ValueError(
                f"the optimizer's state of parameter {number} has {quoted(sorted(entries))}, not {sorted(sample)}"
            )
        for name, value in entries.items():
            if not _fits(name, value, sample[name], sample.values()):
                raise ValueError(f"the optimizer's {name} of parameter {number} is {_told(value)}")


def _checked_groups(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Check the groups' options, and return the group of every parameter."""
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimizer has {len(optimizer.param_groups)} groups of parameters, saved are {len(saved)}"
        )
    if [number for group in saved for number in group["params"]] != list(range(count)):
        raise ValueError(f"the optimizer's groups do not have its {count} parameters")
    for ours, theirs in zip(optimizer.param_groups, saved, strict=True):
        for name in theirs.keys() & ours.keys() - {"params"}:
            value = theirs[name]
            # Rates change while training; what else an option may be only the options tell.
            changed = type(value) is type(ours[name]) is float and math.isfinite(value) and value >= 0
            if not changed and (type(value) is not type(ours[name]) or value != ours[name]):
                raise ValueError(f"the optimizer's {name} is {_told(value)}, not {_told(ours[name])}")
    return [place for place, group in enumerate(saved) for _ in group["params"]]


def _sample(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], like: Sequence[Tensor]) -> Mapping[str, Any]:
    """Return the state of the first parameter of such an optimizer after a step with some gradient."""
    parameters = [nn.Parameter(torch.zeros(one.shape, dtype=one.dtype, device=one.device)) for one in like]
    accepted = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    made = type(optimizer)([{**group, "params": parameters}], **options)

    def closure() -> float:
        made.zero_grad()
        loss = torch.stack([((one - 1) ** 4).sum() for one in parameters]).sum()
        loss.backward()
        return loss.item()

    if needs_closure(optimizer):
        made.step(closure)
    else:
        closure()
        for one in parameters if isinstance(optimizer, torch.optim.SparseAdam) else []:
            one.grad = None if one.grad is None else one.grad.to_sparse()
        made.step()
    return made.state[parameters[0]]


def _fits(name: str, value: Any, sample: Any, samples: Iterable[Any]) -> bool:
    if isinstance(sample, list):
        shapes = [one.shape for one in samples if isinstance(one, Tensor)]
        return isinstance(value, list) and all(
            one is None or _is_number(one) or (isinstance(one, Tensor) and one.shape in [*shapes, ()]) for one in value
        )
    if isinstance(value, Tensor) and isinstance(sample, Tensor):
        if value.shape != sample.shape or value.is_floating_point() != sample.is_floating_point():
            return False
    elif not (_is_number(value) and _is_number(sample)):
        return value is None and sample is None
    return name != "step" or (math.isfinite(value) and float(value) >= 0)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, Tensor) and value.dim() == 0)


def _told(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else quoted(value)
