"""A worker's line to its servers: gradients out, parameters back.

Bytes per worker, n those of the parameters: a push sends n, a fetch receives n (and a header each way and server).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.strategies.server.messages import Expected, Kind, Post
from allreduce_sgd.strategies.server.roles import Role
from allreduce_sgd.strategies.server.shards import Vectors
from allreduce_sgd.strategies.server.wire import make_wires

__all__ = ["Line"]


class Line:
    """Requests to all of a worker's servers at once. `incoming` holds what the last `fetch` or `mix` brought."""

    def __init__(self, role: Role, vectors: Vectors, compression: CompressionOptions, seed: int) -> None:
        self.post = Post(role.world)
        self.incoming = vectors.memory()
        self.staleness = (0.0, 0.0)
        """Sum of the staleness, and number, of all workers' gradients, as the first server last told."""
        self._role = role
        self._vectors = vectors
        self._shards = range(vectors.shards)
        self._wires = [make_wires(compression, vectors, shard, seed, role.world.rank) for shard in self._shards]

    def load(self, values: Sequence[Tensor]) -> None:
        """Give the servers the parameters to begin with, a flat tensor per vector. One worker does."""
        for shard, holder in enumerate(self._role.holders):
            self.post.send(holder, Kind.LOAD, tensors=self._cut(values, shard))
        self.post.flush()

    def push(self, gradient: Sequence[Tensor] | None, lr: float, versions: Sequence[int], finite: bool = True) -> None:
        """Start sending a gradient (None: none, or not a finite one), which must not change before `flush`.

        `versions` are those of the parameters that it was computed at, one per source.
        """
        self.post.training = True
        for shard, (source, version) in enumerate(zip(self._role.sources, versions, strict=True)):
            tensors = [] if gradient is None else self._encoded(gradient, shard)
            self.post.send(source, Kind.PUSH, (lr, version, gradient is not None, finite, 0), tensors)
        self.post.training = False

    def flush(self) -> None:
        """Wait until what has been sent may change."""
        self.post.flush()

    def fetch(self, at_least: Sequence[int], training: bool) -> list[int]:
        """Fill `incoming` with parameters of at least these versions, one per source, and return their versions."""
        self.post.training = training
        answers = [self._expect(shard, source) for shard, source in enumerate(self._role.sources)]
        for source, least in zip(self._role.sources, at_least, strict=True):
            self.post.send(source, Kind.FETCH, (least, training))
        self.post.training = False
        messages = [answer.wait() for answer in answers]
        self.staleness = messages[0].numbers[1], messages[0].numbers[2]
        return [int(message.numbers[0]) for message in messages]

    def start_mix(self, values: Sequence[Tensor]) -> list[Expected]:
        """Start sending parameters, which must not change before `flush`; the answers fill `incoming`."""
        self.post.training = True
        answers = [self._expect(shard, source) for shard, source in enumerate(self._role.sources)]
        for shard, source in enumerate(self._role.sources):
            self.post.send(source, Kind.MIX, tensors=self._cut(values, shard))
        self.post.training = False
        return answers

    def settle(self) -> list[int]:
        """Wait until all that this worker pushed has been taken in, and return the servers' versions."""
        answers = [self.post.expect(source) for source in self._role.sources]
        for source in self._role.sources:
            self.post.send(source, Kind.SETTLE)
        return [int(answer.wait().numbers[0]) for answer in answers]

    def tell(self) -> tuple[list[int], list[int]]:
        """Return how many bytes each server has moved in training, and how many gradients had staleness 0, 1, ..."""
        n_bytes, bins = [], 0
        for server in self._role.server_ranks:
            numbers = self.post.ask(server, Kind.TELL).numbers
            n_bytes.append(int(numbers[0]))
            if server == self._role.holders[0]:
                bins = int(numbers[1])
        histogram = torch.zeros(bins, dtype=torch.float64)
        # The first server's counts follow its answer.
        self.post.take(self._role.holders[0], [histogram])
        return n_bytes, [int(count) for count in histogram.tolist()]

    def save(self, step: int) -> None:
        """Have all servers take part in a checkpoint. One worker does."""
        for server in self._role.server_ranks:
            self.post.send(server, Kind.SAVE, (step,))
        self.post.flush()

    def done(self) -> None:
        for source in self._role.sources:
            self.post.send(source, Kind.DONE)
        self.post.flush()

    def state_dict(self) -> list[Any]:
        """Return what compression keeps."""
        return [None if wires is None else [wire.state_dict() for wire in wires] for wires in self._wires]

    def load_state_dict(self, state: Sequence[Sequence[Mapping[str, Any]] | None]) -> None:
        for wires, kept in zip(self._wires, state, strict=True):
            for wire, one in zip(wires or [], kept or [], strict=True):
                wire.load_state_dict(one)

    def _expect(self, shard: int, source: int) -> Expected:
        return self.post.expect(source, self._cut([one.buffer for one in self.incoming], shard))

    def _cut(self, values: Sequence[Tensor], shard: int) -> list[Tensor]:
        return [value[piece] for value, piece in zip(values, self._vectors.pieces(shard), strict=True)]

    def _encoded(self, gradient: Sequence[Tensor], shard: int) -> list[Tensor]:
        parts = self._cut(gradient, shard)
        wires = self._wires[shard]
        if wires is None:
            return parts
        for wire, part in zip(wires, parts, strict=True):
            wire.encode(part)
        return [wire.message for wire in wires]
