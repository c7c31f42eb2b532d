"""PowerSGD: every matrix M of gradients as P Qᵀ of rank r, both factors added up over the ranks.

Vogels, Karimireddy and Jaggi, "PowerSGD: practical low-rank gradient compression for distributed optimization",
NeurIPS 2019, arXiv 1905.13727. One step of subspace iteration, from the Q of the step before (warm start):

    P = sum of Mᵢ Q,    P = orthonormal basis of P,    Qᵢ = Mᵢᵀ P,    Q = sum of Qᵢ,    u = P Qᵀ,    sentᵢ = P Qᵢᵀ

Both sums are all-reduces, so that bytes do not grow with the number of ranks: for an m by n matrix
2(P-1)/P r (m + n) e per rank, e the bytes of an element (float32 for narrower signals). Vectors, and matrices for
which r (m + n) is no less than m n, travel whole, with the first of the two. Two phases.

A parameter's matrix is as the paper has it, outermost dimension times all others, in the order in which they lie in
memory, so that channels_last is no copy. Factors are kept as r rows: that product is several times as fast on the CPU.

Differences from the paper: its error feedback keeps Mᵢ minus the mean that all got, ours (`sent`) what this rank's
matrix lost; their sums over the ranks, on which alone the method depends, are equal. Householder's QR orthogonalises
instead of Gram-Schmidt, which needs no guard against zero columns; Q is orthogonalised too, lest it shrinks with the
gradients. After a step whose Q is not finite, that of the step before is used again. u has the same bits on ranks
whose processors and numbers of threads are the same, as each of them multiplies P Qᵀ.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import Codec, Exchange, is_finite
from allreduce_sgd.compression.seeds import reseed
from allreduce_sgd.compression.workspace import Workspace

__all__ = ["PowerSGD"]


class _Matrix(NamedTuple):
    """Where a matrix lies in the signal, and its two factors in theirs, as `rank` rows each."""

    start: int
    rows: int
    columns: int
    rank: int
    left_start: int
    right_start: int

    def of(self, signal: Tensor) -> Tensor:
        return signal[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)

    def left(self, factors: Tensor) -> Tensor:
        return factors[self.left_start : self.left_start + self.rank * self.rows].view(self.rank, self.rows)

    def right(self, factors: Tensor) -> Tensor:
        return factors[self.right_start : self.right_start + self.rank * self.columns].view(self.rank, self.columns)


class PowerSGD(Codec):
    """Low-rank compression of the matrices in a bucket. Keeps Q.

    `slots` are the parts of the signal in the parameters' shapes and strides, in order; `seed`, the same on all ranks,
    draws the first Q.
    """

    rounds = 2

    def __init__(self, slots: Sequence[Tensor], rank: int, seed: tuple[int, ...]) -> None:
        if rank < 1:
            raise ValueError(f"rank is {rank}, allowed are 1 and more")
        self._seed = seed
        self._right: Tensor | None = None
        self._workspace = Workspace()
        self._matrices: list[_Matrix] = []
        self._vectors: list[slice] = []
        self._length = self._left_length = self._right_length = self._vectors_length = 0
        for slot in slots:
            self._add(slot, rank)

    def reduce(self, signal: Tensor, comm: Communicator) -> Exchange:
        if signal.numel() != self._length:
            raise ValueError(f"the signal has {signal.numel()} elements, its parameters {self._length}")
        wide = torch.promote_types(signal.dtype, torch.float32)
        narrow = wide is not signal.dtype
        values = self._take("values", self._length, wide, signal).copy_(signal) if narrow else signal
        right = self._start(wide, signal)

        first = self._take("first", self._left_length + self._vectors_length, wide, signal)
        left, vectors = first[: self._left_length], first[self._left_length :]
        for matrix in self._matrices:
            torch.mm(matrix.right(right), matrix.of(values).t(), out=matrix.left(left))
        self._gather_vectors(values, vectors)
        yield comm.all_reduce(first)

        own_right = self._take("own right", self._right_length, wide, signal)
        for matrix in self._matrices:
            orthonormalise_(matrix.left(left))
            torch.mm(matrix.left(left), matrix.of(values), out=matrix.right(own_right))
        sum_right = self._take("sum right", self._right_length, wide, signal).copy_(own_right)
        work = comm.all_reduce(sum_right)
        # While it travels.
        sent = self._take("sent", self._length, wide, signal)
        self._multiply(left, own_right, sent)
        for piece in self._vectors:
            sent[piece] = values[piece]
        yield work

        u = self._take("u", self._length, wide, signal)
        self._multiply(left, sum_right, u)
        self._scatter_vectors(vectors, u)
        if is_finite(sum_right):
            right.copy_(sum_right)
            for matrix in self._matrices:
                orthonormalise_(matrix.right(right))
        if narrow:
            u = self._workspace.like("narrow u", signal).copy_(u)
            sent = self._workspace.like("narrow sent", signal).copy_(sent)
        return u, sent

    def state_dict(self) -> dict[str, Any]:
        return {"right": self._right, "seed": list(self._seed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._right = None if state["right"] is None else state["right"].clone()
        self._seed = tuple(state["seed"])

    def _add(self, slot: Tensor, rank: int) -> None:
        """Take the next parameter in, as a matrix where that is worth it, else as a vector."""
        start, numel = self._length, slot.numel()
        self._length += numel
        long = [dimension for dimension in range(slot.dim()) if slot.shape[dimension] > 1]
        rows = slot.shape[max(long, key=slot.stride)] if len(long) > 1 and numel else 1
        columns = numel // rows
        rank = min(rank, rows, columns)
        if rank * (rows + columns) >= numel:
            self._vectors.append(slice(start, start + numel))
            self._vectors_length += numel
            return
        self._matrices.append(_Matrix(start, rows, columns, rank, self._left_length, self._right_length))
        self._left_length += rank * rows
        self._right_length += rank * columns

    def _start(self, dtype: torch.dtype, signal: Tensor) -> Tensor:
        """Return Q: of the step before, or random."""
        if self._right is None:
            generator = torch.Generator()
            reseed(generator, *self._seed)
            self._right = torch.randn(self._right_length, dtype=dtype, generator=generator)
        if self._right.numel() != self._right_length or self._right.dtype is not dtype:
            raise ValueError(
                f"the Q that was kept has {self._right.numel()} elements of {self._right.dtype}, this bucket's "
                f"{self._right_length} of {dtype}: it was kept for another bucket or rank"
            )
        self._right = self._right.to(signal.device)
        return self._right

    def _take(self, name: str, length: int, dtype: torch.dtype, signal: Tensor) -> Tensor:
        return self._workspace.take(name, (length,), dtype, signal.device)

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        for matrix in self._matrices:
            torch.mm(matrix.left(left).t(), matrix.right(right), out=matrix.of(out))

    def _gather_vectors(self, values: Tensor, vectors: Tensor) -> None:
        position = 0
        for piece in self._vectors:
            end = position + piece.stop - piece.start
            vectors[position:end] = values[piece]
            position = end

    def _scatter_vectors(self, vectors: Tensor, out: Tensor) -> None:
        position = 0
        for piece in self._vectors:
            end = position + piece.stop - piece.start
            out[piece] = vectors[position:end]
            position = end


def orthonormalise_(rows: Tensor) -> None:
    """Replace the rows, no more than they are long, by an orthonormal basis of what they span."""
    rows.copy_(torch.linalg.qr(rows.t()).Q.t())
