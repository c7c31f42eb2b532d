"""A model that does harm: on one rank, in one place of one step. `TEST_FAULT` is "WAY PLACE RANK STEP".

Ways: kill, stop (SIGSTOP), raise, memory (there is none left). Places: start, compute, hook (of a gradient), bucket (in
the midst of an exchange), progress (the progress thread), checkpoint (half of a file is written), evaluation.
`TEST_FAULT_TIME` names a file that gets the time, and without which nothing happens a second time.
"""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from allreduce_sgd import checkpoint, durable
from allreduce_sgd.comm.progress import Operation, ProgressEngine

_SOME_BYTES = 256 * 2**20


def _rank() -> int:
    return int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


class _Victim(nn.Module):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        first = nn.Linear(features, 96)
        self.body = nn.Sequential(first, nn.ReLU(), nn.Linear(96, classes))
        self.steps = 0
        way, place, rank, step = os.environ["TEST_FAULT"].split()
        self.way, self.step = way, int(step)
        self.place = place if int(rank) == _rank() and not self.time_file.exists() else None
        self.suffer("start")
        if self.place == "hook":
            first.weight.register_hook(lambda gradient: self.suffer("hook"))
        if self.place == "bucket":
            self.harm_exchanges()
        if self.place == "progress":
            self.harm_progress()
        if self.place == "checkpoint":
            self.harm_checkpoints()

    @property
    def time_file(self) -> Path:
        return Path(os.environ["TEST_FAULT_TIME"])

    def forward(self, inputs: Tensor) -> Tensor:
        self.steps += self.training
        self.suffer("compute" if self.training else "evaluation")
        if self.place == "progress" and self.steps >= self.step:
            # It has no core of its own here, and looks after what lies around for long.
            time.sleep(0.5)
        return self.body(inputs.flatten(1))

    def suffer(self, place: str) -> None:
        if place == self.place and (self.steps >= self.step or place == "start") and not self.time_file.exists():
            self.time_file.write_text(str(time.time()))
            match self.way:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "raise":
                    raise ArithmeticError(f"the {place} went wrong")
                case "memory":
                    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + _SOME_BYTES, resource.RLIM_INFINITY))
                    self.kept = [torch.ones(2**20) for _ in range(_SOME_BYTES // 2**20)]

    def harm_exchanges(self) -> None:
        advance = Operation.advance

        def advance_and_suffer(operation: Operation) -> bool:
            moved = advance(operation)
            if not operation.finished and operation.name().startswith("all_reduce of 7"):
                self.suffer("bucket")
            return moved

        setattr(Operation, "advance", advance_and_suffer)  # noqa: B010 - types know of no other methods

    def harm_progress(self) -> None:
        look = ProgressEngine._look_if_due

        def look_and_suffer(engine: ProgressEngine) -> None:
            assert threading.current_thread().name == "allreduce-progress"
            self.suffer("progress")
            look(engine)

        setattr(ProgressEngine, "_look_if_due", look_and_suffer)  # noqa: B010

    def harm_checkpoints(self) -> None:
        write = durable.write_file

        def write_and_suffer(path: Path, data: bytes | memoryview) -> None:
            if self.steps >= self.step:
                write(path, data[: len(data) // 2])
            self.suffer("checkpoint")
            write(path, data)

        setattr(checkpoint, "write_file", write_and_suffer)  # noqa: B010


Samples = tuple[Tensor, Tensor]


def _drawn(seed: int, count: int) -> tuple[Samples, Samples]:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.rand(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)
    return samples, samples


def drawn_by_each_rank() -> tuple[Samples, Samples]:
    return _drawn(_rank(), 30)


def fewer_on_rank_1() -> tuple[Samples, Samples]:
    return _drawn(0, 30 - _rank())


def victim(classes: int) -> nn.Module:
    return _Victim(64, classes)
