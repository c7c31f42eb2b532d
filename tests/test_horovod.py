"""What connecting to Horovod refuses, how operations are named, and waiting for a library that is polled."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from allreduce_sgd.comm import horovod
from allreduce_sgd.comm.base import ReduceOp, Traffic
from allreduce_sgd.comm.polled import PolledWork
from allreduce_sgd.errors import CommunicationError, CommunicationTimeout, ConfigError
from allreduce_sgd.topology import Topology

CPU = torch.device("cpu")


class HeldBack:
    """A Horovod of two ranks whose operations end when the test says so; rank 1 gives what rank 0 gives."""

    Sum, Min, Max, Product = 1, 3, 4, 5

    def __init__(self, rank: int = 0, size: int = 2, **answers: bool) -> None:
        self.seen = rank, size
        self.answers = {"cuda_built": False, "rocm_built": False, "mpi_built": True, "mpi_enabled": True}
        self.answers |= {"mpi_threads_supported": True, "is_initialized": True, **answers}
        self.global_process_set = object()
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.ended: set[int] = set()
        self.error: Exception | None = None
        self.shut_down = False

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__["answers"]:
            raise AttributeError(name)
        return lambda: self.answers[name]

    def rank(self) -> int:
        return self.seen[0]

    def size(self) -> int:
        return self.seen[1]

    def shutdown(self) -> None:
        self.shut_down = True

    def allreduce_async_(self, tensor: Tensor, name: str, op: int, process_set: object) -> int:
        self.names.append(name)
        self.tensors.append(tensor)
        return len(self.names) - 1

    def poll(self, handle: int) -> bool:
        return handle in self.ended

    def synchronize(self, handle: int) -> Tensor:
        if self.error is not None:
            raise self.error
        return self.tensors[handle].mul_(2)


def installed(monkeypatch: pytest.MonkeyPatch, fake: HeldBack) -> HeldBack:
    monkeypatch.setitem(sys.modules, "horovod", SimpleNamespace(torch=fake))
    monkeypatch.setitem(sys.modules, "horovod.torch", fake)
    return fake


def connected(monkeypatch: pytest.MonkeyPatch) -> tuple[HeldBack, horovod.HorovodCommunicator]:
    fake = installed(monkeypatch, HeldBack())
    return fake, horovod.connect(Topology(rank=0, size=2), CPU, 5.0)


def refused(topology: Topology, device: torch.device = CPU) -> str:
    with pytest.raises(ConfigError) as problem:
        horovod.connect(topology, device, 5.0)
    text = str(problem.value)
    assert text.startswith("--backend horovod: ")
    assert "\n" not in text
    return text


def test_a_missing_horovod_is_named_with_the_other_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.delitem(sys.modules, "horovod.torch", raising=False)
    assert "choose mpi, nccl or gloo" in refused(Topology())


def test_a_gpu_needs_a_horovod_built_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, HeldBack())
    assert "without GPU support and cannot serve --device cuda:1" in refused(Topology(), torch.device("cuda", 1))


@pytest.mark.parametrize("seen", [(0, 1), (1, 2), (0, 3)])
def test_other_ranks_than_ours_are_refused(monkeypatch: pytest.MonkeyPatch, seen: tuple[int, int]) -> None:
    installed(monkeypatch, HeldBack(*seen))
    text = refused(Topology(rank=0, size=2))
    assert f"rank {seen[0]} of {seen[1]}, MPI for rank 0 of 2; start with" in text
    installed(monkeypatch, HeldBack(*seen, mpi_built=False))
    assert "built without MPI" in refused(Topology(rank=0, size=2))


def test_mpi_without_threads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, HeldBack(mpi_threads_supported=False))
    assert "MPI_THREAD_MULTIPLE" in refused(Topology(rank=0, size=2, world=SingleAgreement()))


class SingleAgreement:
    """As much of an mpi4py communicator as `Topology.agree` uses, for one process that stands for all."""

    def Iallgather(self, data: Any, lengths: Any) -> "SingleAgreement":  # noqa: N802
        lengths[0] = data[0]
        lengths[1] = data[0]
        return self

    def Iallgatherv(self, data: bytearray, target: list[Any]) -> "SingleAgreement":  # noqa: N802
        target[0][:] = data + data
        return self

    def Test(self) -> bool:  # noqa: N802
        return True


def test_operations_in_flight_have_names_of_their_own_that_return(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, comm = connected(monkeypatch)
    works = [comm.all_reduce(torch.ones(1)) for _ in range(200)]
    assert len(set(fake.names)) == 200
    fake.ended.update(range(200))
    for work in works:
        work.wait()
    for _ in range(20):
        fake.ended.add(len(fake.names))
        comm.all_reduce(torch.ones(1)).wait()
    for _ in range(1000):
        fake.ended.add(len(fake.names))
        comm.all_reduce(torch.ones(1)).wait()
    assert 200 <= len(set(fake.names)) < 1024


def test_a_name_still_in_flight_is_waited_for_with_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, comm = connected(monkeypatch)
    comm.timeout_seconds = 0.2

    def start_many() -> None:
        for _ in range(2000):
            comm.all_reduce(torch.ones(3))

    with pytest.raises(CommunicationTimeout, match="all_reduce of 3 float32"):
        start_many()
    assert len(set(fake.names)) == len(fake.names)
    fake.ended.add(0)
    first = comm.all_reduce(torch.ones(3))
    assert fake.names[-1] == fake.names[0]
    assert not first.done()


def test_communicators_do_not_share_names(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, comm = connected(monkeypatch)
    fake.ended.update(range(10))
    other = horovod.HorovodCommunicator(comm._job, fake.global_process_set, [0, 1], 5.0)
    comm.all_reduce(torch.ones(1))
    other.all_reduce(torch.ones(1))
    assert len(set(fake.names)) == 2


def test_horovod_is_shut_down_only_by_who_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, comm = connected(monkeypatch)
    fake.ended.add(0)
    comm.close()
    assert not fake.shut_down


@pytest.mark.parametrize(
    ("dtype", "carried"),
    [(torch.bfloat16, torch.float32), (torch.bool, torch.int32), (torch.uint8, torch.int32), (torch.complex64, None)],
)
def test_what_horovod_cannot_reduce_is_carried_by_what_it_can(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, carried: torch.dtype | None
) -> None:
    fake, comm = connected(monkeypatch)
    fake.ended.add(0)
    buffer = torch.ones(2, 3, dtype=dtype)
    assert comm.all_reduce(buffer).wait() is not None
    assert fake.tensors[0].dtype is (carried or torch.float32)
    assert (buffer.data_ptr() == fake.tensors[0].data_ptr()) == (carried is None)
    torch.testing.assert_close(buffer, torch.full((2, 3), 2).to(dtype))


@pytest.mark.parametrize("operation", ["all_reduce", "reduce_scatter", "all_gather", "broadcast"])
def test_more_than_a_c_integer_counts_is_refused(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    _, comm = connected(monkeypatch)
    with pytest.raises(ValueError, match=rf"{operation}: Horovod takes at most 2147483647 elements"):
        getattr(comm, operation)(torch.empty(2**31, dtype=torch.float32, device="meta"))


def test_dtypes_that_nothing_carries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, comm = connected(monkeypatch)
    with pytest.raises(ValueError, match=r"cannot reduce tensors of torch\.uint16"):
        comm.all_reduce(torch.ones(3, dtype=torch.uint16))
    with pytest.raises(ValueError, match=r"average of torch\.int32"):
        comm.all_reduce(torch.ones(3, dtype=torch.int32), ReduceOp.AVERAGE)


def test_an_error_of_horovod_is_ours_at_every_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, comm = connected(monkeypatch)
    work = comm.all_reduce(torch.ones(3))
    fake.ended.add(0)
    fake.error = RuntimeError("Horovod has been shut down")
    assert work.done()
    for _ in range(2):
        with pytest.raises(CommunicationError, match=r"all_reduce of 3 float32 .* has been shut down"):
            work.wait()
    assert work.done()


def test_a_polled_work_waits_until_its_deadline_and_finishes_once() -> None:
    ended, finished = [False], []
    traffic = Traffic()
    work = PolledWork(
        "the work", torch.ones(1), lambda: ended[0], lambda: finished.append(1), timeout_seconds=0.1, traffic=traffic
    )
    for limit, seconds in ((None, 0.1), (0.3, 0.3)):
        started = time.monotonic()
        with pytest.raises(CommunicationTimeout, match=f"the work: not finished after {seconds:g} s"):
            work.wait(limit)
        assert seconds <= time.monotonic() - started < seconds + 1
    assert not work.done()
    assert not finished
    ended[0] = True
    assert work.done()
    assert work.wait().tolist() == work.wait().tolist() == [1.0]
    assert finished == [1]
    assert 0.4 <= traffic.waited_seconds <= traffic.busy_seconds


def test_a_wait_sleeps_instead_of_spinning() -> None:
    work = PolledWork("the work", torch.ones(1), lambda: False, lambda: None, 0.5, Traffic())
    started = time.thread_time()
    with pytest.raises(CommunicationTimeout):
        work.wait()
    assert time.thread_time() - started < 0.25
