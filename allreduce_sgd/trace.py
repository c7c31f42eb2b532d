"""A timeline of one training step of all ranks: what each computes, when it waits, and what its collectives do.

The training thread's row shows the step, in it forward, backward and optimizer, and within or between these "waiting",
the time in which the thread does nothing but wait for communication. Bytes and algorithm are among the arguments of a
collective.

Nothing is changed for it: hooks of the module tell the forward pass and where the backward pass comes in, a callback
of autograd its end, hooks of the optimizer its step, and for as long as is recorded the communicator's methods are
covered by ones that note the time. The loss lies between forward and backward. On a GPU the times are those of the
host, which launches kernels ahead. Ends of operations are exact for our own communicator; other back ends tell theirs
only to who waits.
"""

import functools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from allreduce_sgd.chrome_trace import RankTrace, Span, chrome_trace, write_trace
from allreduce_sgd.comm.base import Communicator, Work
from allreduce_sgd.comm.clock import clock_offsets
from allreduce_sgd.comm.objects import all_gather_object

__all__ = ["StepRecorder", "StepTrace", "gather_trace"]

_OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier")


class StepRecorder:
    """Records the steps of `module` (the outermost wrapper) and `optimizer`, whose ranks exchange over `comm`."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, comm: Communicator) -> None:
        self._module = module
        self._optimizer = optimizer
        self._comm = comm
        self._spans: list[Span] = []
        self._started: dict[str, float] = {}
        self._collectives: list[_Collective] = []
        self._ended_seconds = 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens in this context: one step. What was recorded before is forgotten."""
        self._spans, self._collectives = [], []
        with ExitStack() as stack:
            for handle in (
                self._module.register_forward_pre_hook(lambda module, inputs: self._begin("forward")),
                self._module.register_forward_hook(self._after_forward),
                self._optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self._begin("optimizer")),
                self._optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._end("optimizer")),
            ):
                stack.callback(handle.remove)
            for name in _OPERATIONS:
                stack.enter_context(_covered(self._comm, name, self._observed(name, getattr(self._comm, name))))
            self._begin("step")
            try:
                yield
                self._ended_seconds = time.perf_counter()
                self._end("step")
            finally:
                self._started.clear()

    def spans(self) -> list[Span]:
        """Return what was recorded, in the order in which it began."""
        collectives = [each.span(self._comm, self._ended_seconds) for each in self._collectives]
        return sorted([*self._spans, *collectives], key=lambda span: (span.start_seconds, -span.end_seconds))

    def _begin(self, name: str) -> None:
        self._started[name] = time.perf_counter()

    def _end(self, name: str) -> None:
        started = self._started.pop(name, None)
        if started is not None:
            self._spans.append(Span(name, started, time.perf_counter()))

    def _after_forward(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._end("forward")
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._in_backward)

    def _in_backward(self, gradient: Tensor) -> None:
        if "step" in self._started and "backward" not in self._started:
            self._begin("backward")
            # DistributedDataParallel queued its own before, so that its end is ours too.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end("backward"))

    def _observed(self, operation: str, call: Callable[..., Work]) -> Callable[..., Work]:
        @functools.wraps(call)
        def observed(*arguments: Any, **options: Any) -> Work:
            launched = time.perf_counter()
            work = call(*arguments, **options)
            ordinal = sum(each.operation == operation for each in self._collectives)
            collective = _Collective(operation, ordinal, arguments[0] if arguments else None, launched, work)
            self._collectives.append(collective)
            if options.get("blocking"):
                self._waited(collective, launched)
            else:
                work.wait = self._observed_wait(collective, work.wait)  # type: ignore[method-assign]
            return work

        return observed

    def _observed_wait(self, collective: "_Collective", wait: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def observed(timeout: float | None = None) -> Tensor:
            started = time.perf_counter()
            idle = not collective.work.done()
            try:
                return wait(timeout)
            finally:
                if idle:
                    self._waited(collective, started)

        return observed

    def _waited(self, collective: "_Collective", started_seconds: float) -> None:
        collective.awaited_seconds = time.perf_counter()
        if "step" in self._started:
            arguments = {"for": collective.name}
            self._spans.append(Span("waiting", started_seconds, collective.awaited_seconds, None, arguments))


@dataclass
class _Collective:
    operation: str
    ordinal: int
    buffer: Tensor | None
    launched_seconds: float
    work: Work
    awaited_seconds: float | None = None

    @property
    def name(self) -> str:
        return f"{self.operation} {self.ordinal}"

    def span(self, comm: Communicator, stopped_seconds: float) -> Span:
        arguments: dict[str, Any] = {}
        if self.buffer is not None:
            arguments = {"bytes": self.buffer.nbytes, "dtype": str(self.buffer.dtype).removeprefix("torch.")}
        if self.operation == "all_reduce" and self.buffer is not None:
            arguments["algorithm"] = comm.describe_algorithm(self.buffer.nbytes)
        turn = getattr(self.work, "started_seconds", None)
        ended = getattr(self.work, "ended_seconds", None) or self.awaited_seconds
        if ended is None and not self.work.done():
            # Methods that are late by some steps leave it under way.
            ended, arguments["unfinished"] = stopped_seconds, True
        turn = self.launched_seconds if turn is None else turn
        return Span(self.name, self.launched_seconds, turn if ended is None else ended, turn, arguments)


@contextmanager
def _covered(comm: Communicator, name: str, method: Callable[..., Work]) -> Iterator[None]:
    """Have this object, and no other of its class, answer `name` with `method`."""
    setattr(comm, name, method)
    try:
        yield
    finally:
        delattr(comm, name)


def gather_trace(recorder: StepRecorder, comm: Communicator) -> list[RankTrace]:
    """Return what every rank recorded, in rank order. All ranks must call, soon after the step."""
    offsets = clock_offsets(comm)
    own = [socket.gethostname(), [asdict(span) for span in recorder.spans()]]
    return [
        RankTrace(host, offset, [Span(**span) for span in spans])
        for offset, (host, spans) in zip(offsets, all_gather_object(comm, own), strict=True)
    ]


class StepTrace:
    """Has step `number` of a training written to a file, by rank 0."""

    def __init__(
        self, path: Path, number: int, module: nn.Module, optimizer: torch.optim.Optimizer, comm: Communicator
    ) -> None:
        self._path = path
        self._number = number
        self._comm = comm
        self._recorder = StepRecorder(module, optimizer, comm)

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Enclose step number `step`. All ranks must enter, and raise or end, together."""
        if step != self._number:
            yield
            return
        with self._recorder.recording():
            yield
        traces = gather_trace(self._recorder, self._comm)
        if self._comm.rank == 0:
            write_trace(self._path, chrome_trace([(f"step {step}", traces)]))
