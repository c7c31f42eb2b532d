"""The serving loop: a server takes requests as they come, from whoever, until every client says that it is done.

Requests of one client are served in its order. A fetch that asks for a version yet to come waits for it, which is all
that synchronous training needs. Parameters are sent from where they lie, and no update changes them before they have
left: a client that fetches has its receive posted, so that it never takes long.

Deadlines: while workers take tickets, and while some have pushed what others still owe, the server raises
CommunicationTimeout after 0.9 of the communicator's deadline without a request, and says whom it waits for. Otherwise
(ranks evaluate, write a checkpoint, or all compute) it waits as long as it takes: there the workers' own deadlines
count, and the abort of the job by whichever rank fails.

Bytes: per worker and step a push of n bytes comes and a fetch of n leaves, 2pn in all for p workers, shared by the
servers; with --clip-norm S servers in lockstep exchange their norms, 8 (S - 1) bytes each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allreduce_sgd.errors import CommunicationTimeout, MismatchError
from allreduce_sgd.gradients.replicate import ranks_text
from allreduce_sgd.strategies.server.messages import Kind, Message, Post
from allreduce_sgd.strategies.server.roles import Role
from allreduce_sgd.strategies.server.rules import Push, Rule, Update
from allreduce_sgd.strategies.server.shards import Master
from allreduce_sgd.strategies.server.tickets import Tickets
from allreduce_sgd.strategies.server.wire import Wire

__all__ = ["GradientServer", "Server", "Waiting", "receive_push"]

_NORM_TAG = 31252
# A server knows whom it waits for, and is to speak before the workers that wait for it.
_SOONER = 0.9
# Three years: back ends want a number.
_FOREVER_SECONDS = 1e8


class Waiting(NamedTuple):
    client: int
    at_least: int
    training: bool


class Server:
    """Serves `values`, this rank's part of the parameters, to its clients. `version` is -1 before they are there."""

    def __init__(self, role: Role, values: Sequence[Tensor]) -> None:
        self.role = role
        self.post = Post(role.world)
        self.values = list(values)
        self.version = -1
        self.fetches: list[Waiting] = []
        self._clients = list(role.clients)
        self._tickets = Tickets(range(role.workers))
        # Who may still be receiving `values`.
        self._receiving: list[int] = []
        self._save: Callable[[int], None] = lambda step: None
        self._handlers: dict[Kind, Callable[[Message], None]] = {
            Kind.LOAD: self._load,
            Kind.FETCH: self._fetch,
            Kind.SETTLE: self._settle,
            Kind.OPEN: self._open,
            Kind.TAKE: self._take,
            Kind.CLOSE: self._close,
            Kind.TELL: self._tell,
            Kind.SAVE: lambda message: self._save(int(message.numbers[0])),
            Kind.DONE: lambda message: self._clients.remove(message.source),
        }

    def serve(self, save: Callable[[int], None]) -> None:
        """Answer requests until all clients are done. `save(step)` has this rank take part in a checkpoint."""
        self._save = save
        while self._clients:
            message = self._next()
            handler = self._handlers.get(message.kind)
            if handler is None:
                raise MismatchError(f"rank {message.source} asks for {message.kind.name}, which is not served here")
            handler(message)
        self.post.flush()

    def staleness(self) -> Mapping[int, int]:
        """Return how many gradients had which staleness, so far."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what this server has to save, between two stretches of training."""
        return {"values": self.values, "version": self.version, "training_bytes": self.post.training_bytes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of the same server of as many workers and servers; before `serve`."""
        torch._foreach_copy_(self.values, list(state["values"]))
        self.version = state["version"]
        self.post.training_bytes = state["training_bytes"]

    def waits_for(self) -> list[int]:
        """Return the ranks that training waits for, none where nobody can be blamed."""
        return self._tickets.inside

    def answer_fetches(self) -> None:
        """Send the parameters to all who wait for this version, or an older one."""
        still = []
        for one in self.fetches:
            if self.version < max(0, one.at_least):
                still.append(one)
                continue
            self.post.training = one.training
            self.post.send(one.client, Kind.ANSWER, (self.version, *self.staleness_sums()), self.values)
            self._receiving.append(one.client)
        self.fetches = still

    def wait_for_readers(self) -> None:
        """Wait until `values` may change."""
        while self._receiving:
            self.post.flush(self._receiving.pop())

    def staleness_sums(self) -> tuple[float, float]:
        """Return the sum of the staleness of all gradients, and their number."""
        counts = self.staleness()
        return float(sum(value * count for value, count in counts.items())), float(sum(counts.values()))

    def _next(self) -> Message:
        blamed = self.waits_for()
        seconds = _SOONER * self.post.comm.timeout_seconds if blamed else _FOREVER_SECONDS
        try:
            return self.post.read(self.post.listen().wait(seconds))
        except CommunicationTimeout:
            raise CommunicationTimeout(
                f"rank {self.role.world.rank}, which serves parameters, had no message for {seconds:g} s: it waits for "
                f"{ranks_text(blamed)}, stuck, gone or late"
            ) from None

    def _load(self, message: Message) -> None:
        self.wait_for_readers()
        self.post.take(message.source, self.values)
        self.version = 0
        self.answer_fetches()

    def _fetch(self, message: Message) -> None:
        self.fetches.append(Waiting(message.source, int(message.numbers[0]), message.numbers[1] > 0))
        self.answer_fetches()

    def _settle(self, message: Message) -> None:
        self.post.send(message.source, Kind.ANSWER, (self.version,))

    def _open(self, message: Message) -> None:
        self._tickets.open(int(message.numbers[0]), int(message.numbers[1]))
        self.post.send(message.source, Kind.ANSWER)

    def _take(self, message: Message) -> None:
        ticket = self._tickets.take(message.source, message.numbers[: len(self._tickets.totals)])
        given = (0, 0, 0) if ticket is None else (1, *ticket)
        self.post.send(message.source, Kind.ANSWER, (*given, *self._tickets.totals))

    def _close(self, message: Message) -> None:
        self.post.send(message.source, Kind.ANSWER, (self._tickets.close(), *self._tickets.totals))

    def _tell(self, message: Message) -> None:
        counts = self.staleness()
        bins = [float(counts.get(value, 0)) for value in range(1 + max(counts, default=-1))]
        first = self.role.world.rank == self.role.holders[0]
        tensors = [torch.tensor(bins, dtype=torch.float64)] if first else []
        self.post.send(message.source, Kind.ANSWER, (self.post.training_bytes, len(bins)), tensors)


class GradientServer(Server):
    """Updates `master` by what `rule` makes of the clients' gradients. `wires` decode compressed ones.

    `clip_norm` is for methods in lockstep, where all servers update together.
    """

    def __init__(
        self, role: Role, master: Master, rule: Rule, wires: list[Wire] | None, clip_norm: float | None = None
    ) -> None:
        super().__init__(role, master.values)
        self.master = master
        self.rule = rule
        self._clip_norm = clip_norm
        self._wires = wires
        self._handlers[Kind.PUSH] = self._push

    def staleness(self) -> Mapping[int, int]:
        return self.rule.staleness

    def waits_for(self) -> list[int]:
        return super().waits_for() or self.rule.missing()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "optimizer": self.master.optimizer.state_dict(),
            "rule": self.rule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.master.optimizer.load_state_dict(state["optimizer"])
        self.rule.load_state_dict(state["rule"])

    def _push(self, message: Message) -> None:
        push = receive_push(self.post, message, self.rule, self._wires)
        update = self.rule.push(push, self.version)
        if update is not None:
            self._apply(update)

    def _apply(self, update: Update) -> None:
        self.wait_for_readers()
        if update.step:
            if self._clip_norm is not None:
                self._clip(self._clip_norm)
            self.master.step(update.lr)
        self.version += 1
        self.answer_fetches()

    def _clip(self, max_norm: float) -> None:
        """Scale the gradient down to a global norm over all servers that is at most `max_norm`."""
        world, servers = self.role.world, self.role.holders
        norm = self.master.norm()
        if len(servers) > 1:
            square = norm.double().square().reshape(1)
            squares = {server: torch.zeros_like(square) for server in servers}
            squares[world.rank].copy_(square)
            others = [server for server in servers if server != world.rank]
            works = [world.receive(squares[server], server, _NORM_TAG) for server in others]
            works += [world.send(square, server, _NORM_TAG) for server in others]
            for work in works:
                work.wait()
            # In the order of ranks: the same bits on all servers.
            norm = torch.stack(list(squares.values())).sum().sqrt().to(norm.dtype)
        self.master.clip_(norm, max_norm)


def receive_push(post: Post, message: Message, rule: Rule, wires: list[Wire] | None) -> Push:
    """Receive the gradient that a PUSH announces, into the rule's place for it."""
    lr, version, filled, finite, listed = message.numbers[:5]
    versions = [int(version)]
    if listed:
        table = torch.zeros(int(listed), dtype=torch.float64)
        post.take(message.source, [table])
        versions = [int(one) for one in table.tolist()]
    if filled:
        place = rule.place(message.source)
        if wires is None:
            post.take(message.source, place)
        else:
            post.take(message.source, [wire.message for wire in wires])
            for wire, one in zip(wires, place, strict=True):
                wire.decode(one)
    return Push(message.source, lr, versions, bool(filled), bool(finite))
