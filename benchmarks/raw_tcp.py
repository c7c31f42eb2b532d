"""The floor of an all-reduce between hosts: plain TCP sockets around the ring of hosts, both directions of every link.

One rank per host sends to the next host while it receives from the one before, as much as an all-reduce of the same
buffer must put on each link, 2(N-1)/N·n bytes each way, but at least 8 MiB: a shorter message would measure latency and
the burst that a rate limiter lets pass. One connection and two threads per host: beyond some 25 Gbit/s a single
connection fills no link, and the rate is then no upper limit.
"""

import socket
import threading

from torch import Tensor

from allreduce_sgd.comm.torch_distributed import own_address
from allreduce_sgd.topology import Topology

__all__ = ["LEAST_BYTES", "RawTcp"]

LEAST_BYTES = 8 << 20
_RECEIVED_AT_ONCE_BYTES = 1 << 20


class RawTcp:
    """Connections between neighbouring hosts. All ranks must call the constructor and `close`.

    `timeout_seconds` is the deadline of every wait. Raises ConfigError where a host has no address.
    """

    def __init__(self, topology: Topology, timeout_seconds: float) -> None:
        self._next: socket.socket | None = None
        self._previous: socket.socket | None = None
        self._message = bytes(0)
        leader = topology.local_rank == 0
        listener = topology.agree(lambda: socket.create_server((own_address(), 0)) if leader else None)
        where = None if listener is None else (topology.node, listener.getsockname())
        addresses = dict(entry for entry in topology.gather_all(where) if entry is not None)
        if listener is None:
            return
        with listener:
            # The kernel completes connections to a listening socket, so connecting first and accepting then is no
            # deadlock.
            after = addresses[(topology.node + 1) % topology.nodes]
            self._next = socket.create_connection(after, timeout_seconds)
            listener.settimeout(timeout_seconds)
            self._previous, _ = listener.accept()
        self._previous.settimeout(timeout_seconds)
        self._next.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def prepare(self, link_bytes: float) -> int:
        """Make the message for `link_bytes` and return its true length in bytes, the same on every host."""
        length = max(LEAST_BYTES, round(link_bytes))
        self._message = bytes(length) if self._next is not None else b""
        return length

    def exchange(self, nothing: Tensor) -> Tensor:
        """Send the message to the next host, receive as much from the one before, and return the argument.

        Ranks that do not speak for their host return at once. Raises OSError where a connection fails or is silent.
        """
        if self._next is None or self._previous is None:
            return nothing
        failed: list[OSError] = []

        def send(connection: socket.socket) -> None:
            try:
                connection.sendall(self._message)
            except OSError as problem:
                failed.append(problem)

        sender = threading.Thread(target=send, args=(self._next,), name="raw-tcp-sender", daemon=True)
        sender.start()
        into = memoryview(bytearray(_RECEIVED_AT_ONCE_BYTES))
        left = len(self._message)
        while left:
            received = self._previous.recv_into(into, min(left, len(into)))
            if not received:
                raise ConnectionError("raw TCP: the host before this one closed the connection")
            left -= received
        sender.join()
        if failed:
            raise failed[0]
        return nothing

    def close(self) -> None:
        for connection in (self._next, self._previous):
            if connection is not None:
                connection.close()
