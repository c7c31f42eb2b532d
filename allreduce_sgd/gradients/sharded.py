"""ShardedOptimizer: each rank keeps the optimizer's state of its share of the parameters, and updates only that.

ZeRO stage 1: Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter models", SC 2020, arXiv
1910.02054. Backward passes reduce-scatter the buckets, each rank updates its chunk, and the chunks are all-gathered:
together what an all-reduce sends, 2(P-1)/P n bytes per rank with the ring, and 1/P of the optimizer's work and memory.

Difference from the paper: where all ranks share a node's memory the parameters may lie there once, for all of them.
Then the all-gather is free, so that a step can be cheaper than one of a rank alone. The optimizer is any of torch's:
for those that work element by element chunks are cut regardless of parameters, and the outcome is the unsharded one's
bit for bit where its all-reduce adds in the order of the reduce-scatter (as `shared-memory` does; on three ranks and
more the measured table may give small messages to MPI's own, which rounds otherwise). For the others
(`whole_parameters`) every parameter belongs to one rank, and gradients are all-reduced.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.gradients.buckets import Bucket
from allreduce_sgd.gradients.clipping import clip_factor
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.gradients.shards import Shard

__all__ = ["Groups", "ShardedOptimizer", "is_elementwise"]

Groups = list[dict[str, Any]]

_ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the optimizer is known to update every element by itself, whatever the others are.

    Known are torch's, and those whose class says so by an attribute `elementwise`.
    """
    known = [getattr(torch.optim, name) for name in _ELEMENTWISE if hasattr(torch.optim, name)]
    return type(optimizer) in known or bool(getattr(optimizer, "elementwise", False))


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer of the parameters of `replica` whose work and state are shared out among the ranks.

    `make` builds the optimizer from parameter groups, such as `lambda groups: torch.optim.AdamW(groups, lr=1e-3)`;
    `groups` are those of the module's parameters, None for one group of all. All ranks must construct it, and call
    `step`, `clip_grad_norm_`, `state_dict` and `load_state_dict`, together.

    It changes how the replica reduces: after a backward pass `.grad` of the parameters is None, since no rank has the
    whole average, and gradients are accumulated within `no_sync()` only. `param_groups` hold the shards; learning rates
    set there count. `share_parameters` lays the parameters of all ranks of a node into one memory, if they can: then
    nothing but this optimizer may write to them (`shares_parameters` tells).

    Raises ValueError for optimizers that need a closure, since they decide by the whole gradient.
    """

    def __init__(
        self,
        replica: DistributedDataParallel,
        make: Callable[[Groups], torch.optim.Optimizer],
        groups: Iterable[Mapping[str, Any]] | None = None,
        *,
        share_parameters: bool = False,
        whole_parameters: bool | None = None,
    ) -> None:
        everything: Iterable[Mapping[str, Any]] = [{"params": replica.parameters()}] if groups is None else groups
        whole_groups: Groups = [
            {**group, "params": [one for one in group["params"] if one.requires_grad]} for group in everything
        ]
        sample = make([dict(group) for group in whole_groups])
        closure = inspect.signature(type(sample).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            name = type(sample).__name__
            raise ValueError(f"ShardedOptimizer: {name} decides by the whole gradient; do not shard it")
        self._whole = not is_elementwise(sample) if whole_parameters is None else whole_parameters
        self._replica = replica
        self._order = [one for group in whole_groups for one in group["params"]]
        self._layout = replica.shard(self._whole, share_parameters)
        replica.cleared = replica.passes
        self._shards = self._in_order(whole_groups)
        self._inner = make(self._shard_groups(whole_groups))
        self._sizes = [len(group["params"]) for group in whole_groups]
        super().__init__([{**group, "params": group["params"]} for group in self._inner.param_groups], sample.defaults)
        self._adopt()

    @property
    def shares_parameters(self) -> bool:
        """Whether the ranks of the node have one memory for the parameters."""
        return self._layout is not None and self._layout.shared

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._layout is None:
            self._inner.step()
            return loss
        if self._replica.joining is not None:
            raise RuntimeError("ShardedOptimizer: all ranks must step together, so it cannot be used within join()")
        for shard in self._given_shards():
            same = shard.gradient.dtype is shard.part.dtype
            shard.part.grad = shard.gradient if same else shard.gradient.to(shard.part.dtype)
        self._inner.step()
        self._layout.publish()
        return loss

    @property
    def looks_ahead(self) -> bool:
        """Whether the parameters are, while training, not at the optimizer's own point (`optim/nesterov.py`)."""
        return hasattr(self._inner, "look_back_")

    def look_back_(self) -> None:
        """Move the parameters to the optimizer's own point. All ranks must call."""
        self._look("look_back_")

    def look_ahead_(self) -> None:
        """Move the parameters from the optimizer's own point to where they are to train. All ranks must call."""
        self._look("look_ahead_")

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._replica.zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients in place so that their global norm is at most `max_norm`; returns the norm they had."""
        if self._layout is None:
            return self._replica.clip_grad_norm_(max_norm, norm_type)
        assert self._replica.comm is not None
        gradients = self.gradients()
        norms = [torch.linalg.vector_norm(one.float() if one.itemsize < 4 else one, norm_type) for one in gradients]
        own = torch.linalg.vector_norm(torch.stack(norms).double(), norm_type) if norms else torch.zeros(()).double()
        infinite = norm_type == float("inf")
        total = own.reshape(1) if infinite else own.reshape(1) ** norm_type
        self._replica.comm.all_reduce(total, ReduceOp.MAX if infinite else ReduceOp.SUM, blocking=True).wait()
        double = any(parameter.dtype is torch.float64 for parameter in self._order)
        norm = (total if infinite else total ** (1.0 / norm_type)).reshape(())
        norm = norm.to(torch.float64 if double else torch.float32)
        factor = clip_factor(norm, max_norm)
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    def gradients(self) -> list[Tensor]:
        """Return what this rank has of the gradients of the last pass: views, of its shards."""
        if self._layout is None:
            return [one.grad for one in self._order if one.grad is not None]
        return [shard.gradient for shard in self._given_shards()]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that updates this rank's shards."""
        return self._inner

    @property
    def whole_parameters(self) -> list[Tensor]:
        """All that is trained, by this rank and others, in the order of `state_dict`."""
        return list(self._order)

    def state_bytes(self) -> int:
        """Return the size of this rank's part of the optimizer's state."""
        values = [value for state in self._inner.state.values() for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the whole optimizer, as the unsharded one's. All ranks must call; all get it."""
        if self._layout is None:
            return self._inner.state_dict()
        own = {index: self._inner.state.get(shard.part, {}) for index, shard in enumerate(self._shards)}
        places = {id(parameter): place for place, parameter in enumerate(self._order)}
        kinds = {
            str(places[id(shard.parameter)]): {key: _kind(value, shard) for key, value in own[index].items()}
            for index, shard in enumerate(self._shards)
        }
        state: dict[int, dict[str, Any]] = {}
        tensors: dict[str, str] = {}
        assert self._replica.comm is not None
        for theirs in all_gather_object(self._replica.comm, kinds):
            for place, entries in theirs.items():
                for key, (what, value) in entries.items():
                    if what == "shard":
                        tensors[key] = value
                        state.setdefault(int(place), {}).setdefault(key, None)
                    else:
                        plain = value if what == "value" else torch.tensor(value, dtype=getattr(torch, what))
                        state.setdefault(int(place), {}).setdefault(key, plain)
        for key, dtype in sorted(tensors.items()):
            self._gather_key(key, getattr(torch, dtype), own, places, state)
        return {"state": dict(sorted(state.items())), "param_groups": self._numbered_groups()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state of the whole optimizer: that of the unsharded one, or of any number of ranks."""
        if self._layout is None:
            self._inner.load_state_dict(dict(state_dict))
            self._adopt()
            return
        places = {id(parameter): place for place, parameter in enumerate(self._order)}
        numbers = {id(part): number for number, part in enumerate(self._parts())}
        state: dict[int, dict[str, Any]] = {}
        for shard in self._shards:
            whole = state_dict["state"].get(places[id(shard.parameter)], {})
            state[numbers[id(shard.part)]] = {key: self._slice(value, shard) for key, value in whole.items()}
        groups, first = [], 0
        for given, group in zip(state_dict["param_groups"], self._inner.param_groups, strict=True):
            count = len(group["params"])
            groups.append({**given, "params": list(range(first, first + count))})
            first += count
        self._inner.load_state_dict({"state": state, "param_groups": groups})
        self._adopt()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_adopted"):
            raise RuntimeError("ShardedOptimizer: shards are cut once; make a new one for other parameters")
        super().add_param_group(param_group)

    def _look(self, how: str) -> None:
        if self._layout is None:
            getattr(self._inner, how)()
            return
        assert self._replica.comm is not None
        # The ranks may have one memory, which others may still be reading.
        self._replica.comm.barrier().wait()
        getattr(self._inner, how)()
        self._layout.publish()

    def _adopt(self) -> None:
        """Have schedulers and scalers see the optimizer that does the work."""
        self.param_groups = self._inner.param_groups
        self.state = self._inner.state
        self._adopted = True

    def _parts(self) -> list[Tensor]:
        return [part for group in self._inner.param_groups for part in group["params"]]

    def _in_order(self, groups: Groups) -> list[Shard]:
        if self._layout is None:
            return []
        places = {id(one): place for place, one in enumerate(self._order)}
        return sorted(
            (shard for shard in self._layout.shards if id(shard.parameter) in places),
            key=lambda shard: places[id(shard.parameter)],
        )

    def _shard_groups(self, groups: Groups) -> Groups:
        if self._layout is None:
            return groups
        parts: dict[int, nn.Parameter] = {id(shard.parameter): shard.part for shard in self._shards}
        # torch refuses optimizers without parameters, which a rank of a small model may have none of.
        return [
            {
                **group,
                "params": [parts[id(one)] for one in group["params"] if id(one) in parts]
                or [nn.Parameter(torch.zeros(0, 0))],
            }
            for group in groups
        ]

    def _given_shards(self) -> list[Shard]:
        """Return the shards that the last pass gave a gradient, and clear the gradients of all parts."""
        passes = self._replica.passes
        cleared = self._replica.cleared
        if passes - cleared > 1:
            raise RuntimeError(
                "ShardedOptimizer: several backward passes were reduced since zero_grad() of the optimizer or the "
                "wrapper; accumulate within no_sync()"
            )
        if self._layout is not None and self._replica.layout_changed(self._layout):
            raise RuntimeError(
                "ShardedOptimizer: parameters were frozen or unfrozen, or another one was made, since; make a new one, "
                "of all parameters"
            )
        unused = self._replica.unused_parameters()
        for shard in self._shards:
            shard.part.grad = None
        return [shard for shard in self._shards if passes != cleared and id(shard.parameter) not in unused]

    def _gather_key(
        self,
        key: str,
        dtype: torch.dtype,
        own: Mapping[int, Mapping[str, Any]],
        places: Mapping[int, int],
        state: Mapping[int, dict[str, Any]],
    ) -> None:
        assert self._layout is not None
        for number, bucket in enumerate(self._layout.buckets):
            flat = torch.zeros(bucket.buffer.numel(), dtype=dtype, device=bucket.buffer.device)
            values = Bucket(bucket.parameters, flat, bucket.spacing)
            slots = {id(one): slot for one, slot in zip(values.parameters, values.slots, strict=True)}
            starts = {id(one): start for one, start in zip(values.parameters, values.starts, strict=True)}
            for index, shard in enumerate(self._shards):
                if shard.bucket == number and isinstance(own[index].get(key), Tensor):
                    begin = starts[id(shard.parameter)]
                    cut = flat[begin + shard.start : begin + shard.stop]
                    (slots[id(shard.parameter)] if self._whole else cut).copy_(own[index][key])
            self._layout.gather(number, flat)
            for parameter in bucket.parameters:
                entries = state.get(places.get(id(parameter), -1), {})
                if key in entries and entries[key] is None:
                    entries[key] = slots[id(parameter)].clone()

    def _slice(self, value: Any, shard: Shard) -> Any:
        if not isinstance(value, Tensor) or value.shape != shard.parameter.shape or value.dim() == 0:
            return value
        if self._whole:
            return value.clone()
        flat = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
        Bucket([shard.parameter], flat).slots[0].copy_(value)
        return flat[shard.start : shard.stop].clone()

    def _numbered_groups(self) -> Groups:
        numbered, first = [], 0
        for group, size in zip(self._inner.param_groups, self._sizes, strict=True):
            numbered.append({**group, "params": list(range(first, first + size))})
            first += size
        return numbered


def _kind(value: Any, shard: Shard) -> tuple[str, Any]:
    """Describe a value of the state so that other ranks can rebuild it: what lies in shards is gathered."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return ("shard", dtype) if value.shape == shard.part.shape and value.dim() > 0 else (dtype, value.tolist())
    return "value", value
