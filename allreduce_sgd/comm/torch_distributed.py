"""NCCL and Gloo through torch.distributed, behind our protocol.

Rendezvous needs no environment variables: rank 0 opens a store on a free port and MPI tells the others where. Control
messages on CPU tensors go through Gloo also where the back end is NCCL. These libraries do not show what they send, so
`traffic.bytes_sent` is None; `busy_seconds` runs from the start of an operation to the wait that sees its end.

Ranks that launch different things are not named here, as they are over MPI (`desync.py`). Seen of Gloo in torch 2.13: a
rank to which more bytes come than it expects ends its process (`gloo::EnforceNotMet`, "collective mismatch"); fewer
bytes, another dtype of the same width and another way of combining give a wrong result and no error; another operation,
or a rank that does not come, ends the wait at the deadline. TORCH_DISTRIBUTED_DEBUG=DETAIL makes torch compare kind,
shape and dtype (not how they are combined) before each collective, with more messages, and name what two ranks have.
NCCL was not tried.

One process has one default process group: it is used if the caller already made it, else made here and destroyed by
`close`.
"""

import contextlib
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from allreduce_sgd.comm.base import FinishedWork, ReduceOp, Traffic, Work, check_buffer, check_reduction
from allreduce_sgd.errors import CommunicationError, CommunicationTimeout, ConfigError, write_line
from allreduce_sgd.interfaces import GLOO, NCCL, bound_address, interface_mistake, usable_interfaces
from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.topology import Topology

__all__ = ["TorchCommunicator", "connect", "own_address"]

_OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.AVERAGE: dist.ReduceOp.SUM,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
}
_STORE_SECONDS = 60.0


def connect(topology: Topology, backend: str, timeout_seconds: float) -> "TorchCommunicator":
    """Make the communicator of all ranks with `backend` "gloo" or "nccl". All ranks must call."""
    available = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}[backend]
    if not (dist.is_available() and available()):
        raise ConfigError(f"--backend {backend}: this build of torch has no {backend}; choose mpi or another back end")
    timeout = timedelta(seconds=timeout_seconds)
    if dist.is_initialized():
        everyone = list(range(dist.get_world_size()))
        return TorchCommunicator(dist.new_group(timeout=timeout), everyone, backend, timeout_seconds)
    _check_interfaces(topology, backend)
    store_timeout = timedelta(seconds=min(_STORE_SECONDS, timeout_seconds))
    address = topology.agree(lambda: own_address() if topology.rank == 0 and topology.nodes > 1 else "127.0.0.1")
    store: Store | None = None
    if topology.rank == 0:
        store = TCPStore(address, 0, topology.size, True, store_timeout, wait_for_workers=False)
    where = topology.broadcast((address, store.port) if isinstance(store, TCPStore) else ("", 0))
    if store is None:
        store = TCPStore(where[0], where[1], topology.size, False, store_timeout)
    kinds = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    dist.init_process_group(kinds, store=store, rank=topology.rank, world_size=topology.size, timeout=timeout)
    return TorchCommunicator(None, list(range(topology.size)), backend, timeout_seconds)


def _check_interfaces(topology: Topology, backend: str) -> None:
    """Raise ConfigError on all ranks where the interfaces chosen on any host cannot serve. All ranks must call."""
    between_hosts = topology.nodes > 1

    def check_choices() -> None:
        for variable in (GLOO, NCCL) if backend == "nccl" else (GLOO,):
            mistake = interface_mistake(variable, os.environ.get(variable, ""), between_hosts)
            if mistake is not None:
                raise ConfigError(mistake)

    topology.agree(check_choices)
    if not between_hosts:
        return
    address, reason = bound_address(os.environ.get(GLOO))
    places = topology.gather_all((topology.node, topology.host, address, reason))

    def check_addresses() -> None:
        choices = (
            f"choose an interface between the hosts with {GLOO}, here {', '.join(usable_interfaces(True)) or 'none'}"
        )
        if ipaddress.ip_address(address).is_loopback:
            raise ConfigError(
                f"--backend {backend}: {address}, {reason}, is not one that other hosts can reach; {choices}"
            )
        for node, host, other, _ in places:
            if node != topology.node and other == address:
                raise ConfigError(
                    f"--backend {backend}: {address}, {reason}, is an address of {host} too, so there is no network "
                    f"between the two; {choices}"
                )

    topology.agree(check_addresses)


class TorchCommunicator:
    """A communicator over a torch.distributed process group; None is the default group, which `close` destroys.

    `members` are the ranks of the default group that belong to it, in the order of our ranks (torch itself sorts the
    ranks of a group).
    """

    algorithm = None
    algorithm_table = None

    def __init__(
        self, group: dist.ProcessGroup | None, members: list[int], backend: str, timeout_seconds: float
    ) -> None:
        self.backend = backend
        self.timeout_seconds = timeout_seconds
        self.traffic = Traffic(counts_bytes=False)
        self.rank = members.index(dist.get_rank())
        self.size = len(members)
        self._group = group
        self._members = members
        self._open = True

    def describe_algorithm(self, n_bytes: int) -> None:
        return None

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def allocate_shared(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        return None

    def all_reduce(
        self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM, *, shared_result: bool = False, blocking: bool = False
    ) -> Work:
        check_reduction(buffer, op, "all_reduce")
        data = self._admit(buffer, "all_reduce")
        if self.size == 1 or data.numel() == 0:
            return FinishedWork(data)
        carried, carried_op = _carried(data, op)
        early = op is ReduceOp.AVERAGE and data.dtype is torch.float16
        if early:
            # Half precision overflows at 65504: divided before, the sum of averages stays in range.
            data.div_(self.size)

        def finish() -> None:
            if op is ReduceOp.AVERAGE and not early:
                data.div_(self.size)

        work = self._start(
            "all_reduce", data, lambda: [dist.all_reduce(carried, carried_op, self._group, async_op=True)], finish
        )
        if blocking:
            work.wait()
        return work

    def reduce_scatter(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        # Gloo has no reduce-scatter of uneven chunks; an all-reduce leaves the same chunk, and the rest is undefined.
        return self.all_reduce(buffer, op)

    def all_gather(self, buffer: Tensor) -> Work:
        data = self._admit(buffer, "all_gather")
        flat = _bytes_of(data)
        width = data.element_size()
        pieces = [chunk(data.numel(), self.size, index) for index in range(self.size)]
        views = [flat[piece.start * width : piece.stop * width] for piece in pieces]

        def start() -> list[dist.Work]:
            # Chunks may differ in length, which torch's all_gather does not take: each rank broadcasts its own.
            works = (
                dist.broadcast(view, self._members[root], self._group, async_op=True)
                for root, view in enumerate(views)
                if view.numel()
            )
            return [work for work in works if work is not None]

        return self._start("all_gather", data, start)

    def broadcast(self, buffer: Tensor, root: int = 0) -> Work:
        self._check_peer(root, "broadcast: root")
        data = self._admit(buffer, "broadcast")
        if data.numel() == 0:
            return FinishedWork(data)
        view = _bytes_of(data)
        return self._start(
            "broadcast", data, lambda: [dist.broadcast(view, self._members[root], self._group, async_op=True)]
        )

    def barrier(self) -> Work:
        return self._start(
            "barrier", torch.empty(0), lambda: [dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)]
        )

    def send(self, buffer: Tensor, to: int, tag: int = 0) -> Work:
        self._check_peer(to, "send: to")
        data = self._admit(buffer, "send")
        view = _bytes_of(data)
        return self._start(
            f"send to rank {to} (tag {tag})", data, lambda: [dist.isend(view, self._members[to], self._group, tag)]
        )

    def receive(self, buffer: Tensor, source: int | None = None, tag: int = 0) -> Work:
        if source is not None:
            self._check_peer(source, "receive: source")
        data = self._admit(buffer, "receive")
        view = _bytes_of(data)
        peer = None if source is None else self._members[source]
        name = f"receive from {'any rank' if source is None else f'rank {source}'} (tag {tag})"
        return self._start(name, data, lambda: [dist.irecv(view, peer, self._group, tag)])

    def split(self, color: int, key: int = 0) -> "TorchCommunicator":
        mine = torch.zeros(self.size, 3, dtype=torch.int64)
        mine[self.rank] = torch.tensor([color, key, self._members[self.rank]])
        table = self.all_reduce(mine).wait().tolist()
        timeout = timedelta(seconds=self.timeout_seconds)
        rows = sorted((row for row in table if row[0] == color), key=lambda row: row[1])
        members = [row[2] for row in rows]
        # Only the members of each part come together: torch would otherwise have all ranks make all parts. It then
        # names the group after them, so that a later one finds the addresses of one closed before; all ranks need not.
        alone = len(members) < dist.get_world_size()
        group = dist.new_group(members, timeout=timeout, use_local_synchronization=alone)
        return TorchCommunicator(group, members, self.backend, self.timeout_seconds)

    def abort(self, why: str) -> NoReturn:
        write_line(f"rank {self.rank} of {self.size}: {why}", sys.stderr)
        os._exit(1)

    def close(self) -> None:
        if not self._open:
            return
        self.barrier().wait()
        self._open = False
        dist.destroy_process_group(self._group)

    def _admit(self, buffer: Tensor, operation: str) -> Tensor:
        if not self._open:
            raise CommunicationError("the communicator is closed")
        return check_buffer(buffer, operation)

    def _check_peer(self, rank: int, what: str) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{what}: rank {rank} is outside 0..{self.size - 1}")

    def _start(
        self,
        operation: str,
        data: Tensor,
        start: Callable[[], Sequence[dist.Work | None]],
        finish: Callable[[], None] | None = None,
    ) -> Work:
        if not self._open:
            raise CommunicationError("the communicator is closed")
        name = (
            f"{operation} of {data.numel()} {str(data.dtype).removeprefix('torch.')} (rank {self.rank} of {self.size})"
        )
        return _TorchWork(name, data, [work for work in start() if work is not None], finish, self)


class _TorchWork:
    def __init__(
        self,
        name: str,
        buffer: Tensor,
        works: list[dist.Work],
        finish: Callable[[], None] | None,
        owner: TorchCommunicator,
    ) -> None:
        self._name = name
        self._buffer = buffer
        self._works = works
        self._finish = finish
        self._owner = owner
        self._account = owner.traffic.account
        self._started_seconds = time.perf_counter()
        self._finished = False

    def wait(self, timeout: float | None = None) -> Tensor:
        if self._finished:
            return self._buffer
        limit = self._owner.timeout_seconds if timeout is None else timeout
        started = time.perf_counter()
        try:
            for work in self._works:
                left = max(0.001, started + limit - time.perf_counter())
                work.wait(timedelta(seconds=left))
        except RuntimeError as problem:
            if time.perf_counter() - started >= 0.95 * limit:
                raise CommunicationTimeout(
                    f"{self._name}: not finished after {limit:g} s; a rank is stuck, gone or late"
                ) from problem
            raise CommunicationError(f"{self._name} failed: {problem}") from problem
        if self._finish is not None:
            self._finish()
        self._finished = True
        ended = time.perf_counter()
        self._owner.traffic.waited(self._account, ended - started)
        self._owner.traffic.ended(self._account, ended - self._started_seconds)
        return self._buffer

    def done(self) -> bool:
        return self._finished or all(work.is_completed() for work in self._works)


def _bytes_of(data: Tensor) -> Tensor:
    """View a contiguous tensor as bytes, so that every dtype travels."""
    return data.view(-1).view(torch.uint8)


def _carried(data: Tensor, op: ReduceOp) -> tuple[Tensor, dist.ReduceOp.RedOpType]:
    """Return a view of `data` in a dtype that the libraries reduce, and the operation that means the same there."""
    if data.is_complex():
        if op is ReduceOp.PRODUCT:
            raise ValueError("all_reduce: gloo and nccl have no product of complex tensors")
        return torch.view_as_real(data), _OPS[op]
    if data.dtype is torch.bool:
        either = op in (ReduceOp.SUM, ReduceOp.MAX)
        return data.view(torch.uint8), dist.ReduceOp.MAX if either else dist.ReduceOp.MIN
    return data, _OPS[op]


def own_address() -> str:
    """Return an address of this host that other hosts can reach.

    That of the interface named by GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME if set, else what the host's name resolves
    to, else the first interface that is up and no loopback.
    """
    interfaces = psutil.net_if_addrs()

    def ipv4(name: str) -> list[str]:
        return [entry.address for entry in interfaces.get(name, []) if entry.family == socket.AF_INET]

    named = [os.environ[key].split(",")[0] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if key in os.environ]
    candidates = [address for name in named for address in ipv4(name)]
    with contextlib.suppress(OSError):
        candidates += socket.gethostbyname_ex(socket.gethostname())[2]
    up = psutil.net_if_stats()
    candidates += [address for name in interfaces if name in up and up[name].isup for address in ipv4(name)]
    reachable = [address for address in candidates if not ipaddress.ip_address(address).is_loopback]
    if not reachable:
        raise ConfigError(
            "no network interface of this host is up; set GLOO_SOCKET_IFNAME to the one between the hosts"
        )
    return reachable[0]
