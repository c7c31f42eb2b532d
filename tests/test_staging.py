"""Staging with a copier whose copies end when the test says so; the real one where a GPU is."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from allreduce_sgd.comm.progress import Program
from allreduce_sgd.comm.staging import CudaCopier, mpi_takes_device_memory, staged


@dataclass
class HandCopy:
    """A copy that happens when it is let go: before that, neither side has changed."""

    source: Tensor
    target: Tensor
    ended: bool = False
    error: Exception | None = None

    def let_go(self) -> None:
        self.target.copy_(self.source)
        self.ended = True

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.ended


@dataclass
class HandCopier:
    """Keeps a log of what was queued, and the copies for the test to let go."""

    log: list[str]
    out: list[HandCopy] = field(default_factory=list)
    into: list[HandCopy] = field(default_factory=list)

    def host_memory(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(numel, dtype=dtype)

    def follow_caller(self) -> None:
        self.log.append("follow")

    def copy_out(self, device: Tensor, host: Tensor) -> HandCopy:
        self.log.append(f"out {len(self.out)}")
        self.out.append(HandCopy(device, host))
        return self.out[-1]

    def copy_in(self, host: Tensor, device: Tensor) -> HandCopy:
        self.log.append(f"in {len(self.into)}")
        self.into.append(HandCopy(host, device))
        return self.into[-1]


class Reductions:
    """Reductions (doubling, so that a segment reduced twice shows) that end when the test allows it."""

    def __init__(self, log: list[str], allowed: int | None = None) -> None:
        self.log = log
        self.allowed = allowed
        self.count = 0
        self.fails_at: int | None = None

    def __call__(self, segment: Tensor) -> Program:
        index = self.count
        self.count += 1
        self.log.append(f"reduce {index}")
        while self.allowed is not None and self.allowed <= index:
            yield False
        if index == self.fails_at:
            raise ConnectionError("the peer is gone")
        segment.mul_(2)
        self.log.append(f"reduced {index}")


def advance(program: Program, turns: int = 5) -> bool:
    """Give the program some turns; say whether it has ended."""
    return any(next(program, None) is None for _ in range(turns))


def start(numel: int, segment_numel: int, allowed: int | None = None) -> tuple[Tensor, HandCopier, Reductions, Program]:
    log: list[str] = []
    buffer, copier, reductions = torch.arange(numel, dtype=torch.float32), HandCopier(log), Reductions(log, allowed)
    host = copier.host_memory(numel, torch.float32)
    return buffer, copier, reductions, staged(buffer, host, segment_numel, reductions, copier)


def test_all_copies_out_are_queued_by_the_call_behind_what_the_caller_queued() -> None:
    _, copier, _, _ = start(10, 4)
    assert copier.log == ["follow", "out 0", "out 1", "out 2"]
    assert [len(copy.source) for copy in copier.out] == [4, 4, 2]


def test_reductions_are_made_by_the_call_and_run_later() -> None:
    made: list[int] = []
    log: list[str] = []

    def reduce(segment: Tensor) -> Program:
        made.append(len(segment))
        return Reductions(log)(segment)

    staged(torch.ones(10), torch.ones(10), 4, reduce, HandCopier([]))
    assert made == [4, 4, 2]
    assert log == []


def test_copies_and_reductions_overlap() -> None:
    _, copier, reductions, program = start(12, 4, allowed=0)
    before = len(copier.log)
    assert not advance(program)
    assert copier.log[before:] == []
    copier.out[0].let_go()
    assert not advance(program)
    # Copies out 1 and 2 are under way while segment 0 is reduced.
    assert copier.log[before:] == ["reduce 0"]
    assert not copier.out[1].ended
    copier.out[1].let_go()
    reductions.allowed = 1
    assert not advance(program)
    # Copy in 0 is under way while segment 1 is reduced, and copy out 2 too.
    assert copier.log[before:] == ["reduce 0", "reduced 0", "in 0", "reduce 1"]
    assert not copier.into[0].ended
    assert not copier.out[2].ended


def test_a_segment_is_not_reduced_before_it_has_arrived() -> None:
    _, copier, _, program = start(8, 4)
    copier.out[1].let_go()
    assert not advance(program)
    assert "reduce 0" not in copier.log


def test_it_ends_with_the_last_copy_in() -> None:
    buffer, copier, _, program = start(8, 4)
    for copy in copier.out:
        copy.let_go()
    assert not advance(program)
    assert len(copier.into) == 2
    copier.into[1].let_go()
    assert not advance(program)
    copier.into[0].let_go()
    assert advance(program)
    assert buffer.tolist() == [2.0 * index for index in range(8)]


def test_turns_tell_whether_it_got_on() -> None:
    _, copier, _, program = start(8, 4)
    assert [next(program), next(program)] == [False, False]
    copier.out[0].let_go()
    assert [next(program), next(program)] == [True, False]


@given(
    numel=st.integers(0, 40),
    segment_numel=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    seed=st.integers(0, 100),
)
def test_every_element_is_reduced_once(numel: int, segment_numel: int, dtype: torch.dtype, seed: int) -> None:
    chance = random.Random(seed)
    log: list[str] = []
    buffer, copier = torch.arange(numel).to(dtype).view(-1, 1), HandCopier(log)
    program = staged(buffer, copier.host_memory(numel, dtype), segment_numel, Reductions(log), copier)
    for _ in range(1000):
        if advance(program, turns=1):
            break
        # Copies of one direction end in their order, as on a stream.
        waiting = [each for each in (copier.out, copier.into) if any(not copy.ended for copy in each)]
        if waiting and chance.random() < 0.7:
            next(copy for copy in chance.choice(waiting) if not copy.ended).let_go()
    assert buffer.view(-1).tolist() == [2 * index for index in range(numel)]
    assert len(copier.into) == -(-numel // segment_numel)


def test_a_failed_reduction_is_raised_when_no_copy_uses_the_memory_any_more() -> None:
    _, copier, reductions, program = start(12, 4)
    reductions.fails_at = 1
    copier.out[0].let_go()
    copier.out[1].let_go()
    assert not advance(program)
    assert copier.log[-1] == "reduce 1"
    copier.out[2].let_go()
    assert not advance(program)
    copier.into[0].let_go()
    with pytest.raises(ConnectionError, match="gone"):
        advance(program)
    assert len(copier.into) == 1


@pytest.mark.parametrize("direction", ["out", "into"])
def test_an_error_of_the_device_is_raised(direction: str) -> None:
    _, copier, _, program = start(4, 4)
    if direction == "into":
        copier.out[0].let_go()
        assert not advance(program)
    getattr(copier, direction)[0].error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory"):
        advance(program)


def test_an_abandoned_program_closes_quietly() -> None:
    _, copier, _, program = start(8, 4, allowed=0)
    copier.out[0].let_go()
    assert not advance(program)
    program.close()  # type: ignore[attr-defined]  # it is a generator, as the engine's programs are
    assert next(program, "ended") == "ended"


def test_tensors_that_do_not_match_are_refused() -> None:
    copier = HandCopier([])
    with pytest.raises(ValueError, match=r"4 torch.float32 elements .* shape \(5,\)"):
        staged(torch.ones(4), torch.ones(5), 2, Reductions([]), copier)
    with pytest.raises(ValueError, match="float64"):
        staged(torch.ones(4), torch.ones(4, dtype=torch.float64), 2, Reductions([]), copier)
    with pytest.raises(ValueError, match="segments of 0"):
        staged(torch.ones(4), torch.ones(4), 0, Reductions([]), copier)
    assert copier.log == []


@pytest.mark.parametrize(("answer", "takes"), [(lambda: 1, True), (lambda: 0, False), (None, False)])
def test_mpi_is_asked_whether_it_takes_device_memory(answer: Callable[[], int] | None, takes: bool) -> None:
    library = SimpleNamespace() if answer is None else SimpleNamespace(MPIX_Query_cuda_support=answer)
    assert mpi_takes_device_memory(library) is takes


def test_the_library_that_mpi4py_loaded_is_asked() -> None:
    """In a process of its own, since importing mpi4py.MPI initialises MPI."""
    program = (
        "import ctypes; from mpi4py import MPI; from allreduce_sgd.comm.staging import mpi_takes_device_memory;"
        "print(hasattr(ctypes.CDLL(MPI.__file__), 'MPI_Send'), mpi_takes_device_memory())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, takes = done.stdout.split()
    assert found == "True"
    assert takes in ("True", "False")
    if not torch.cuda.is_available():
        assert takes == "False"


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def run(program: Program, deadline_seconds: float = 30.0) -> None:
    deadline = time.monotonic() + deadline_seconds
    for _ in program:
        assert time.monotonic() < deadline


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_follows_the_writer_and_the_reader_follows_it(gpu: torch.device, dtype: torch.dtype) -> None:
    copier = CudaCopier(gpu)
    buffer = torch.zeros(1_000_003, dtype=dtype, device=gpu)
    for step in range(3):
        # A gradient that is written late, on a stream that is not the default one.
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            torch.cuda._sleep(50_000_000)
            buffer.fill_(step + 1)
            program = staged(buffer, copier.host_memory(len(buffer), dtype), 65_536, Reductions([]), copier)
        run(program)
        assert bool((buffer * 2 == 4 * (step + 1)).all())


@pytest.mark.cuda
def test_on_a_gpu_starting_does_not_wait_for_the_writer(gpu: torch.device) -> None:
    copier = CudaCopier(gpu)
    buffer = torch.ones(1_000_000, device=gpu)
    host = copier.host_memory(len(buffer), buffer.dtype)
    torch.cuda.synchronize(gpu)
    torch.cuda._sleep(500_000_000)
    buffer.add_(1)
    program = staged(buffer, host, 100_000, Reductions([]), copier)
    assert next(program) is False
    assert not torch.cuda.current_stream(gpu).query()
    run(program)
    assert bool((buffer == 4).all())


@pytest.mark.cuda
def test_on_a_gpu_pinned_memory_is_kept_between_calls(gpu: torch.device) -> None:
    copier = CudaCopier(gpu)
    buffer = torch.ones(1_000_000, device=gpu)
    addresses = set()
    for _ in range(10):
        host = copier.host_memory(len(buffer), buffer.dtype)
        assert host.is_pinned()
        addresses.add(host.data_ptr())
        program = staged(buffer, host, 100_000, Reductions([]), copier)
        del host
        run(program)
        del program
        torch.cuda.synchronize(gpu)
    assert len(addresses) <= 3
