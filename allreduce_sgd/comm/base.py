"""What every communicator offers: collectives and messages on tensors, started at once and waited for with a deadline.

Ranks call the collectives of one communicator in the same order with the same lengths and dtypes. Every operation
returns a `Work`; the buffer belongs to the operation until `wait` returns. Buffers are contiguous tensors of any dtype
that `check_buffer` admits; gradients are never recorded.
"""

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor

__all__ = [
    "Account",
    "AlgorithmTable",
    "Communicator",
    "FinishedWork",
    "ReduceOp",
    "Traffic",
    "Work",
    "check_buffer",
    "check_reduction",
]


class ReduceOp(enum.Enum):
    """How buffers are combined. On bool, SUM and MAX are `or`, PRODUCT and MIN are `and`."""

    SUM = "sum"
    AVERAGE = "average"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"

    # Enum's own is written in Python, and members are looked up in tables for every operation.
    __hash__ = object.__hash__


AlgorithmTable = list[list[list[int | str | None]]]
"""See comm/choice.py."""


@dataclass
class Account:
    """What was moved for one cause, or for all.

    `bytes_sent` counts messages where they are handed to the network, and is None for back ends that do not show it.
    `busy_seconds` adds up the time from each operation's start to its end, `waited_seconds` the time that callers spent
    in `Work.wait`.
    """

    bytes_sent: int | None = 0
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0


class Traffic(Account):
    """What a communicator has moved so far, altogether and for each cause.

    An operation is counted for the cause that was in force when it was started: see `attributed`.
    """

    def __init__(self, counts_bytes: bool = True) -> None:
        super().__init__(0 if counts_bytes else None)
        self.causes: dict[str, Account] = {}
        self.account = self._of("other")
        """The account of what is started now."""
        self.running = self.account
        """The account of the operation that is being advanced."""

    @contextmanager
    def attributed(self, cause: str) -> Iterator[None]:
        """Count what is started within for this cause: "gradients", "evaluation", ..."""
        before, self.account = self.account, self._of(cause)
        try:
            yield
        finally:
            self.account = before

    def sent(self, n_bytes: int) -> None:
        """Count a message of the operation that is being advanced."""
        for account in (self, self.running):
            account.bytes_sent = (account.bytes_sent or 0) + n_bytes

    def ended(self, account: Account, seconds: float) -> None:
        """Count an operation of this account that took so long."""
        self.busy_seconds += seconds
        account.busy_seconds += seconds

    def waited(self, account: Account, seconds: float) -> None:
        """Count that a caller waited so long for an operation of this account."""
        self.waited_seconds += seconds
        account.waited_seconds += seconds

    def _of(self, cause: str) -> Account:
        return self.causes.setdefault(cause, Account(0 if self.bytes_sent is not None else None))


class Work(Protocol):
    """A started operation."""

    def wait(self, timeout: float | None = None) -> Tensor:
        """Wait until the operation has ended and return its buffer.

        `timeout` is in seconds; None takes the communicator's deadline. Raises CommunicationTimeout when it passes
        (the operation goes on, and may be waited for again) and CommunicationError where the operation failed.
        """

    def done(self) -> bool:
        """Say, without waiting, whether the operation has ended (also with an error, which `wait` raises)."""


class FinishedWork:
    """The Work of an operation that had nothing to wait for."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def wait(self, timeout: float | None = None) -> Tensor:
        return self.buffer

    def done(self) -> bool:
        return True


class Communicator(Protocol):
    """A group of ranks that exchange tensors. In its methods, "all ranks" are the ranks of this communicator."""

    rank: int
    size: int
    timeout_seconds: float
    traffic: Traffic

    @property
    def backend(self) -> str:
        """The name of the back end, as `--backend` spells it."""

    @property
    def algorithm(self) -> str | None:
        """The name of the all-reduce algorithm, None where the back end does not tell."""

    @property
    def algorithm_table(self) -> AlgorithmTable | None:
        """Which algorithm serves which size, in the form in which JSON keeps it; None where there is no such table."""

    def describe_algorithm(self, n_bytes: int) -> str | None:
        """How an all-reduce of so many bytes is done, None where the back end does not tell."""

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a zeroed tensor of shape (numel,) in memory that reduces with the fewest copies.

        All ranks must call, with the same numel and dtype. It lives until `close`.
        """

    def allocate_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return one zeroed tensor of shape (numel,) that all ranks read and write; None where they cannot.

        All ranks must call, with the same arguments. It lives as long as tensors that view it. What one rank writes the
        others see after a collective.
        """

    def all_reduce(
        self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM, *, shared_result: bool = False, blocking: bool = False
    ) -> Work:
        """Replace every rank's buffer by the reduction of all, the same bits on all ranks. All ranks must call.

        On several nodes all ranks pass memory of the same `allocate`, at the same place in it, or all other memory;
        within one node they may differ, which is slower.

        `shared_result` allows the result to lie elsewhere: `wait` returns one tensor that all ranks of the node read,
        if the buffer came from `allocate` and the back end can, else the buffer. It must not be written to, and is
        valid until this rank reduces the same buffer again; the buffer itself keeps this rank's data or becomes the
        result. `blocking` returns when it is done, and runs in the caller's thread if nothing is queued before it.
        """

    def reduce_scatter(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        """Make chunk `rank` of the flat buffer the reduction of all ranks' chunks. All ranks must call.

        Chunks are those of `schedules.step.chunk(numel, size, rank)`; the buffer's other elements become undefined.
        """

    def all_gather(self, buffer: Tensor) -> Work:
        """Fill every rank's flat buffer with all ranks' chunks, chunk `rank` being the own one. All ranks must call."""

    def broadcast(self, buffer: Tensor, root: int = 0) -> Work:
        """Replace every rank's buffer by that of rank `root`. All ranks must call."""

    def barrier(self) -> Work:
        """A Work that ends when all ranks have started it. All ranks must call."""

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> Work:
        """Send the buffer to one rank, outside the order of the collectives."""

    def receive(self, buffer: Tensor, source: int | None = None, tag: int = 0) -> Work:
        """Receive a message of exactly the buffer's size from `source` (None: from any rank) with this tag."""

    def split(self, color: int, key: int = 0) -> "Communicator":
        """Return the communicator of the ranks that give the same color, ordered by key. All ranks must call."""

    def abort(self, why: str) -> NoReturn:
        """Print why, and end all ranks of the job."""

    def close(self) -> None:
        """Wait for what is under way and release everything. All ranks must call; a second call does nothing."""


def check_buffer(buffer: Tensor, operation: str) -> Tensor:
    """Return the buffer detached, or raise ValueError in one line where its memory is not one contiguous block."""
    if buffer.layout is not torch.strided:
        raise ValueError(f"{operation}: tensors of layout {buffer.layout} cannot be sent; pass a dense tensor")
    if not buffer.is_contiguous():
        raise ValueError(
            f"{operation}: the tensor of shape {tuple(buffer.shape)} and strides {buffer.stride()} is not contiguous; "
            f"pass tensor.contiguous() or a contiguous buffer"
        )
    return buffer.detach()


def check_reduction(buffer: Tensor, op: ReduceOp, operation: str) -> None:
    """Raise ValueError where `op` has no meaning for the buffer's dtype."""
    if op is ReduceOp.AVERAGE and not (buffer.is_floating_point() or buffer.is_complex()):
        raise ValueError(f"{operation}: the average of {buffer.dtype} tensors is not defined; reduce with SUM")
    if op in (ReduceOp.MIN, ReduceOp.MAX) and buffer.is_complex():
        raise ValueError(f"{operation}: {op.name} of complex tensors is not defined")
