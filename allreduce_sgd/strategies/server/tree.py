"""A tree of servers: leaves add up their workers' gradients for one root, and pass its parameters on.

Gupta, Zhang and Wang, "Model accuracy and runtime tradeoff in distributed deep learning: a systematic study" (Rudra),
ICDM 2016, arXiv 1509.04210. The root has as many clients as there are leaves, instead of workers.

In lockstep a leaf sends on the sum of all its workers' gradients, so that the outcome is that without a tree, to the
rounding of sums in another order. Else it sends on what has come while the root was busy with what it sent before, with
the version of every gradient in the sum, and answers fetches from its copy, which is as old as the root's last answer.

Bytes per step, n those of the parameters: a leaf of f workers moves 2fn below and 2n above (less where sums hold
several gradients), the root 2n per leaf.

Differences from the paper: two levels; staleness is known for every gradient rather than as an average; an update of
n-softsync may take in more gradients than floor(p/n), since sums come whole.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from allreduce_sgd.strategies.server.loop import Server, receive_push
from allreduce_sgd.strategies.server.messages import Kind, Message
from allreduce_sgd.strategies.server.roles import Role
from allreduce_sgd.strategies.server.rules import Push, Rule, Update
from allreduce_sgd.strategies.server.wire import Wire

__all__ = ["Leaf", "Relay"]


class Relay(Rule):
    """Adds up whatever comes, until it is asked what is `due`. The sum is valid until the second next one."""

    def __init__(self, gradient: Sequence[Tensor]) -> None:
        super().__init__(gradient)
        self._arrival = [torch.zeros_like(one) for one in gradient]
        self._sum = [torch.zeros_like(one) for one in gradient]
        self._versions: list[int] = []
        self._lr = 0.0

    def place(self, client: int) -> Sequence[Tensor]:
        return self._arrival

    def push(self, push: Push, version: int) -> Update | None:
        if push.filled and push.finite:
            torch._foreach_add_(self._sum, self._arrival)
            self._versions += push.versions
            self._lr = push.lr
        return None

    def due(self) -> Update | None:
        if not self._versions:
            return None
        # The sum stays where it is, since it will be on its way, and the next one is made elsewhere.
        self.gradient, self._sum = self._sum, self.gradient
        torch._foreach_zero_(self._sum)
        versions, self._versions = self._versions, []
        return Update(self._lr, versions)


class Leaf(Server):
    """Stands between its workers and the root. `values` is memory for its copy of all parameters."""

    def __init__(self, role: Role, values: Sequence[Tensor], rule: Rule, wires: list[Wire] | None) -> None:
        super().__init__(role, values)
        self._rule = rule
        self._wires = wires
        self._root = role.holders[0]
        self._asked = False
        self._asked_training = False
        self._settling: list[Message] = []
        self._sums = (0.0, 0.0)
        self._handlers[Kind.PUSH] = self._push
        self._handlers[Kind.ANSWER] = self._answered

    def serve(self, save: Callable[[int], None]) -> None:
        super().serve(save)
        self.post.send(self._root, Kind.DONE)
        self.post.flush()

    def waits_for(self) -> list[int]:
        return self._rule.missing()

    def staleness_sums(self) -> tuple[float, float]:
        return self._sums

    def answer_fetches(self) -> None:
        super().answer_fetches()
        if self.fetches:
            self._ask(max(one.at_least for one in self.fetches), self.fetches[0].training)

    def _push(self, message: Message) -> None:
        update = self._rule.push(receive_push(self.post, message, self._rule, self._wires), self.version)
        if update is not None:
            # In lockstep: the root waits for it, whatever was asked before.
            self._forward(update, [], self.version + 1)
        self._forward_due()

    def _forward_due(self) -> None:
        update = None if self._asked else self._rule.due()
        if update is not None:
            self._forward(update, update.versions, 0)

    def _forward(self, update: Update, listed: Sequence[int], at_least: int) -> None:
        table = [torch.tensor(listed, dtype=torch.float64)]
        self.post.training = True
        self.post.send(
            self._root,
            Kind.PUSH,
            (update.lr, self.version, update.step, update.finite, len(listed)),
            [*table, *self._rule.gradient] if update.step else [],
        )
        self._ask(at_least, True)

    def _ask(self, at_least: int, training: bool) -> None:
        """Ask the root for parameters, unless it still owes an answer."""
        if not self._asked:
            self.post.training = training
            self.post.send(self._root, Kind.FETCH, (at_least, training))
            self._asked, self._asked_training = True, training

    def _answered(self, message: Message) -> None:
        self.wait_for_readers()
        self.post.training = self._asked_training
        self.post.take(self._root, self.values)
        # The root has answered, so what it was sent has arrived.
        self.post.flush(self._root)
        self.version = int(message.numbers[0])
        self._sums = message.numbers[1], message.numbers[2]
        self._asked = False
        self._forward_due()
        self.answer_fetches()
        self._answer_settled()

    def _settle(self, message: Message) -> None:
        self._settling.append(message)
        self._answer_settled()

    def _answer_settled(self) -> None:
        if not self._asked:
            for message in self._settling:
                super()._settle(message)
            self._settling = []
