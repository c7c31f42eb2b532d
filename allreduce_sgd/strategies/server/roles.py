"""Which ranks serve parameters, which train, and who asks whom.

The last S ranks of the job serve, so that rank 0 is worker 0. Without a tree every worker asks all servers, each of
which has 1/S of the parameters. In a tree of fan-out F (Gupta, Zhang and Wang, "Rudra", ICDM 2016, arXiv 1509.04210)
the first server is the root and has them all, and the others are leaves, each between the root and up to F workers.
"""

from dataclasses import dataclass

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.messages import has_messages
from allreduce_sgd.errors import ConfigError, counted
from allreduce_sgd.schedules.step import chunk
from allreduce_sgd.strategies.options import SERVED, StrategyOptions

__all__ = ["Role", "divide", "server_count"]


@dataclass(frozen=True)
class Role:
    """What this rank does. Ranks are those of `world`.

    `peers` is the communicator of the workers on a worker, and of the servers on a server.
    """

    world: Communicator
    peers: Communicator
    servers: int
    fan_out: int | None = None
    """Workers per leaf at most; None: no tree."""

    @property
    def workers(self) -> int:
        return self.world.size - self.servers

    @property
    def serves(self) -> bool:
        return self.world.rank >= self.workers

    @property
    def is_leaf(self) -> bool:
        return self.fan_out is not None and self.world.rank > self.workers

    @property
    def server_ranks(self) -> range:
        return range(self.workers, self.world.size)

    @property
    def holders(self) -> range:
        """The servers that update parameters: shard s of them is with the s-th. The first keeps the tickets."""
        return self.server_ranks if self.fan_out is None else range(self.workers, self.workers + 1)

    @property
    def sources(self) -> list[int]:
        """Whom a worker sends gradients to and gets parameters from."""
        if self.fan_out is None:
            return list(self.server_ranks)
        return [self.workers + 1 + self._leaf_of(self.world.rank)]

    @property
    def clients(self) -> list[int]:
        """Who sends gradients to this server and gets parameters from it."""
        if self.fan_out is None:
            return list(range(self.workers))
        if not self.is_leaf:
            return list(range(self.workers + 1, self.world.size))
        own = chunk(self.workers, self.servers - 1, self.world.rank - self.workers - 1)
        return list(range(own.start, own.stop))

    def _leaf_of(self, worker: int) -> int:
        leaves = self.servers - 1
        return next(leaf for leaf in range(leaves) if worker < chunk(self.workers, leaves, leaf).stop)


def divide(world: Communicator, options: StrategyOptions) -> Role:
    """Make some ranks servers and the others workers. All ranks must call.

    Raises ConfigError where the ranks are too few, or cannot send one another messages.
    """
    servers = server_count(options, world.size)
    if not has_messages(world):
        raise ConfigError(
            f"--strategy {options.strategy}: --backend {world.backend} has no messages between two ranks, which "
            f"servers need; choose mpi or gloo"
        )
    peers = world.split(int(world.rank >= world.size - servers))
    return Role(world, peers, servers, options.server_tree)


def server_count(options: StrategyOptions, size: int) -> int:
    """Return how many of `size` ranks serve: --servers, or as many as a tree needs. Raises ConfigError, in one line."""
    if options.server_tree is not None:
        return _tree(options, options.server_tree, size)
    servers = options.server_ranks
    given = f"--servers {servers}"
    if servers < 1:
        raise ConfigError(f"{given}: --strategy {options.strategy} needs at least 1 server")
    if servers >= size:
        if options.servers is None:
            given = f"--strategy {options.strategy}"
        raise ConfigError(
            f"{given}: {_ranks(size)} started, and at least one beside the {counted(servers, 'server')} must train; "
            + (f"start at least {servers + 1}" if size <= 2 or options.servers is None else f"choose 1 to {size - 1}")
        )
    return servers


def _tree(options: StrategyOptions, fan_out: int, size: int) -> int:
    flag = f"--server-tree {fan_out}"
    if options.strategy not in SERVED:
        raise ConfigError(f"{flag}: --strategy {options.strategy} has no tree of servers, only {', '.join(SERVED)}")
    fitting = [servers for servers in range(2, size) if servers == 1 + -(-(size - servers) // fan_out)]
    if not fitting:
        near = [other for other in range(max(3, size - 2), size + 3) if _fits(fan_out, other)]
        raise ConfigError(
            f"{flag}: {_ranks(size)} cannot be cut into a root, leaves of {counted(fan_out, 'worker')} each and the "
            f"workers; start {' or '.join(map(str, near[:2]))}"
        )
    if options.servers not in (None, *fitting):
        right = fitting[0]
        raise ConfigError(
            f"--servers {options.servers}: {flag} with {_ranks(size)} needs a root and "
            f"{counted(right - 1, 'leaf', 'leaves')}; choose --servers {right}, or leave it out"
        )
    return options.servers or fitting[0]


def _fits(fan_out: int, size: int) -> bool:
    return any(servers == 1 + -(-(size - servers) // fan_out) for servers in range(2, size))


def _ranks(size: int) -> str:
    return counted(size, "rank")
