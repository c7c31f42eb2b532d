"""What servers do with the gradients that workers push: one rule per method, none of which sends anything.

A rule owns where gradients are received (`place`), and says when an update is due, for which the server's gradient
memory then holds what to step by. Versions count updates; a gradient's staleness is the number of updates between the
version it was computed at and the one it is applied to.

- `Lockstep`, synchronous: the sum of all clients' gradients, each weighted by its client, in the order of ranks.
- `Immediate`, Downpour SGD: Dean et al., "Large scale distributed deep networks", NIPS 2012. Each as it comes.
- `Softsync`: Zhang, Gupta, Lian and Liu, "Staleness-aware async-SGD for distributed deep learning", IJCAI 2016, arXiv
  1511.05950; Gupta, Zhang and Wang, "Model accuracy and runtime tradeoff in distributed deep learning" (Rudra), ICDM
  2016, arXiv 1509.04210. The mean of every floor(p/n) of p workers' gradients, each divided by its staleness.

Difference from the papers: staleness is that of each gradient, not the expected or mean one. Of a sum that a leaf made
in a tree of servers only the mean of 1/staleness can be applied.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allreduce_sgd.errors import MismatchError

__all__ = ["Immediate", "Lockstep", "Push", "Rule", "Softsync", "Update"]


class Push(NamedTuple):
    """What a client says of a gradient that it has pushed."""

    client: int
    lr: float
    versions: Sequence[int]
    """The version that each of the gradients in the sum was computed at."""
    filled: bool = True
    """False: it had no samples, and nothing lies in its place."""
    finite: bool = True
    """False: it overflowed, nothing lies in its place, and an update that needs it is to be skipped."""


class Update(NamedTuple):
    """What the gradient memory holds, and how to step by it."""

    lr: float
    versions: Sequence[int]
    step: bool = True
    """False: nothing to step by, but the version goes on."""
    finite: bool = True


class Rule(ABC):
    """`gradient`: the memory that the optimizer steps by, a tensor per vector. `staleness` counts gradients by it."""

    def __init__(self, gradient: Sequence[Tensor]) -> None:
        self.gradient = list(gradient)
        self.staleness: Counter[int] = Counter()

    @abstractmethod
    def place(self, client: int) -> Sequence[Tensor]:
        """Return where the client's next gradient is to be received, before `push` is told of it."""

    @abstractmethod
    def push(self, push: Push, version: int) -> Update | None:
        """Take in a gradient that lies in its place, at this version; return the update that is due with it, if any."""

    def due(self) -> Update | None:
        """Return an update of what has been taken in, where it can be made at any time."""
        return None

    def missing(self) -> list[int]:
        """Return the clients that others wait for."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"staleness": sorted(self.staleness.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.staleness = Counter(dict(state["staleness"]))

    def _note(self, versions: Sequence[int], version: int) -> list[int]:
        staleness = [version - one for one in versions]
        self.staleness.update(staleness)
        return staleness


class Lockstep(Rule):
    """The sum of one gradient from each client. Memory: one shard per client."""

    def __init__(self, gradient: Sequence[Tensor], clients: Sequence[int]) -> None:
        super().__init__(gradient)
        self._clients = list(clients)
        # The first client's is received where the sum is wanted.
        self._places = {
            client: [torch.zeros_like(one) for one in gradient] if index else self.gradient
            for index, client in enumerate(self._clients)
        }
        self._pushed: dict[int, Push] = {}

    def place(self, client: int) -> Sequence[Tensor]:
        return self._places[client]

    def push(self, push: Push, version: int) -> Update | None:
        """Raises MismatchError where a client is not in step with this server."""
        if push.client in self._pushed or any(one != version for one in push.versions):
            raise MismatchError(
                f"rank {push.client} pushed a gradient of version {push.versions[0]}, the server stands at {version}: "
                f"workers in step push once for every version"
            )
        self._pushed[push.client] = push
        if len(self._pushed) < len(self._clients):
            return None
        pushes = [self._pushed.pop(client) for client in self._clients]
        finite = all(one.finite for one in pushes)
        filled = [self._places[one.client] for one in pushes if one.filled]
        if finite and filled:
            total = filled[0]
            if total is not self.gradient:
                torch._foreach_copy_(self.gradient, total)
            for other in filled[1:]:
                torch._foreach_add_(self.gradient, other)
        return Update(pushes[0].lr, [version], bool(filled) and finite, finite)

    def missing(self) -> list[int]:
        return [client for client in self._clients if client not in self._pushed] if self._pushed else []


class Immediate(Rule):
    """Every gradient, as it comes."""

    def place(self, client: int) -> Sequence[Tensor]:
        return self.gradient

    def push(self, push: Push, version: int) -> Update | None:
        if not (push.filled and push.finite):
            return None
        self._note(push.versions, version)
        return Update(push.lr, push.versions)


class Softsync(Rule):
    """The mean of every `group` gradients, each divided by max(1, its staleness) if `divide`."""

    def __init__(self, gradient: Sequence[Tensor], group: int, divide: bool) -> None:
        if group < 1:
            raise ValueError(f"group is {group}, allowed are 1 and more")
        super().__init__(gradient)
        self._group = group
        self._divide = divide
        self._arrival = [torch.zeros_like(one) for one in gradient]
        self._sum = [torch.zeros_like(one) for one in gradient]
        self._versions: list[int] = []

    def place(self, client: int) -> Sequence[Tensor]:
        return self._arrival

    def push(self, push: Push, version: int) -> Update | None:
        if not (push.filled and push.finite):
            return None
        staleness = self._note(push.versions, version)
        factor = sum(1 / max(1, one) for one in staleness) / len(staleness) if self._divide else 1.0
        torch._foreach_add_(self._sum, self._arrival, alpha=factor)
        self._versions += push.versions
        if len(self._versions) < self._group:
            return None
        versions, self._versions = self._versions, []
        torch._foreach_copy_(self.gradient, self._sum)
        if len(versions) > 1:
            torch._foreach_div_(self.gradient, float(len(versions)))
        torch._foreach_zero_(self._sum)
        return Update(push.lr, versions)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sum": self._sum, "versions": self._versions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        torch._foreach_copy_(self._sum, list(state["sum"]))
        self._versions = list(state["versions"])
