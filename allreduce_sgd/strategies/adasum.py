"""Adasum: gradients are added as far as they are orthogonal, and averaged as far as they are parallel.

Maleki et al., "Scaling distributed training with adaptive summation", MLSys 2021, arXiv 2006.02924. Two gradients are
combined, parameter by parameter ("per layer" in the paper), to

    (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b,

which is a + b where they are orthogonal and (a + b)/2 where they are equal; more of them pairwise, as in a tree: ranks
0 and 1, 2 and 3, then 0-1 and 2-3, and so on. So the step follows how alike the ranks' gradients are, and the learning
rate is that of one rank. A gradient that is zero, such as that of a rank without samples, leaves the other as it is.

Vector halving, distance doubling: on each level partners swap halves of the part that they still hold, dot products are
put together from the parts of all ranks that hold one, by an all-reduce of three float64 numbers per parameter and pair
of vectors, and the result is collected on the way back. For P = 2^k ranks that is 3k rounds and 2(P-1)/P n bytes per
rank beside the dot products. The r ranks beyond the largest power of two first send their whole gradient to one of the
first r ranks, which combines it with its own, and at the end get the result back: 2 rounds and n bytes more for both.
Every element of the result is computed on one rank and copied, so that all have the same bits.

Signal: the gradient; H = 1; no delay; outer step: the optimizer. As a codec it overlaps with back-propagation.

Differences from the paper: the gradients are combined, not the updates of an optimizer with state (its recommendation
for Adam and LAMB); each rank's is the mean over its own samples, whatever their number.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from allreduce_sgd.comm.base import Communicator, FinishedWork, Work
from allreduce_sgd.compression.base import Codec, Exchange
from allreduce_sgd.compression.messages import Together, has_messages
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.sharded import Groups
from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.precision import LossScaling
from allreduce_sgd.strategies.synchronous import Synchronous

__all__ = ["AdaptiveSum", "Adasum"]

# Messages between two ranks come in the order in which they were sent, and exchanges of all buckets advance alike.
_TAG = 31250


class Adasum(Synchronous):
    """Synchronous SGD with Adasum in the place of the average."""

    name = "adasum"

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[Groups], torch.optim.Optimizer],
        comm: Communicator,
        clip_norm: float | None,
        gradients: GradientOptions,
        scaling: LossScaling | None = None,
        resync_every: int | None = None,
    ) -> None:
        if comm.size > 1 and not has_messages(comm):
            raise ConfigError(
                f"--strategy adasum: back end {comm.backend} has no messages between two ranks; take mpi or gloo"
            )
        combine = partial(AdaptiveSum, size=comm.size)
        super().__init__(model, make_optimizer, comm, clip_norm, gradients, False, combine, scaling, resync_every)
        if self._needs_closure:
            raise ConfigError(
                f"--strategy adasum: {type(self.optimizer).__name__} searches along the gradient of the loss, which an "
                f"adaptive sum is not; take another --optimizer"
            )

    def weight(self, share: Share) -> float:
        return 1.0


class AdaptiveSum(Codec):
    """The Adasum of the signals of `size` ranks, as u of the exchange; `slots` are the parts combined each by itself.

    Needs a communicator with messages between two ranks. Keeps nothing.
    """

    def __init__(self, slots: Sequence[Tensor], size: int) -> None:
        self._pieces: list[slice] = []
        start = 0
        for slot in slots:
            if not slot.is_floating_point():
                raise ConfigError(f"--strategy adasum: the model has parameters of {slot.dtype}; only real ones work")
            self._pieces.append(slice(start, start + slot.numel()))
            start += slot.numel()
        self._ranks = 1 << (size.bit_length() - 1)
        self.rounds = max(1, 3 * (size.bit_length() - 1) + (2 if size > self._ranks else 0))

    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        # Every rank has the same rounds, even with nothing to do in some, so that collectives keep their order.
        rank, ranks = comm.rank, self._ranks
        active, folds = rank < ranks, comm.size > ranks
        has_guest = rank + ranks < comm.size
        nothing = FinishedWork(signal)
        u = signal.clone()
        held = slice(0, u.numel())

        if folds:
            guest = torch.empty_like(u) if has_guest else u
            if active:
                yield comm.receive(guest, rank + ranks, _TAG) if has_guest else nothing
            else:
                yield comm.send(signal, rank - ranks, _TAG)
            if has_guest:
                self._combine(u, guest, self._dots(u, guest, held), held)

        path = []
        for level in range(ranks.bit_length() - 1):
            partner, pair, lower = rank ^ (1 << level), rank >> (level + 1), rank & (1 << level) == 0
            table = torch.zeros(ranks >> (level + 1), len(self._pieces), 3, dtype=torch.float64, device=u.device)
            kept, given = _halves(held, lower)
            other = torch.empty_like(u[kept])
            yield _swap(u[given], other, partner, comm) if active else nothing
            if active:
                table[pair] = self._dots(u[kept], other, kept) if lower else self._dots(other, u[kept], kept)
            yield comm.all_reduce(table)
            if active:
                # Seen from the upper rank its own vector is the second of the two.
                self._combine(u[kept], other, table[pair] if lower else table[pair][:, [0, 2, 1]], kept)
            path.append((partner, kept, given))
            held = kept

        for partner, kept, given in reversed(path):
            yield _swap(u[kept], u[given], partner, comm) if active else nothing
        if folds:
            if active:
                yield comm.send(u, rank + ranks, _TAG) if has_guest else nothing
            else:
                yield comm.receive(u, rank - ranks, _TAG)
        return u, signal

    def _parts(self, held: slice) -> Iterator[tuple[int, slice]]:
        """Yield which parameters lie in this stretch of the signal, and where in the stretch."""
        for index, piece in enumerate(self._pieces):
            start, stop = max(piece.start, held.start), min(piece.stop, held.stop)
            if start < stop:
                yield index, slice(start - held.start, stop - held.start)

    def _dots(self, first: Tensor, second: Tensor, held: slice) -> Tensor:
        """Return a.b, a.a and b.b of this stretch for each parameter: float64 of shape (parameters, 3)."""
        dots = torch.zeros(len(self._pieces), 3, dtype=torch.float64, device=first.device)
        for index, part in self._parts(held):
            a, b = first[part].double(), second[part].double()
            dots[index] = torch.stack([a.dot(b), a.dot(a), b.dot(b)])
        return dots

    def _combine(self, own: Tensor, other: Tensor, dots: Tensor, held: slice) -> None:
        """Replace the stretch `own` by its combination with `other`; `dots` are those of whole vectors, own first."""
        product, squares = dots[:, :1], dots[:, 1:]
        factors = torch.where(squares == 0, 1.0, 1.0 - product / (2.0 * squares)).tolist()
        for index, part in self._parts(held):
            own[part].mul_(factors[index][0]).add_(other[part], alpha=factors[index][1])


def _halves(held: slice, lower: bool) -> tuple[slice, slice]:
    """Return the half that the lower or the upper partner keeps, and the one that it gives."""
    middle = (held.start + held.stop) // 2
    first, second = slice(held.start, middle), slice(middle, held.stop)
    return (first, second) if lower else (second, first)


def _swap(outgoing: Tensor, incoming: Tensor, partner: int, comm: Communicator) -> Work:
    """Send to the partner and receive from it; nothing is sent where there are no elements."""
    works = []
    if incoming.numel():
        works.append(comm.receive(incoming, partner, _TAG))
    if outgoing.numel():
        works.append(comm.send(outgoing, partner, _TAG))
    return Together(works, incoming, comm.timeout_seconds)
