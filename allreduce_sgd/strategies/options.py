"""The options of the distribution strategy."""

from dataclasses import dataclass

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.options import option

__all__ = [
    "BELONGS",
    "INNER_STATES",
    "LOCAL",
    "OUTER",
    "PERIODS",
    "PERIOD_SCHEDULES",
    "SERVED",
    "STRATEGIES",
    "StrategyOptions",
]

PERIODS = {"local": 8, "post-local": 16, "slowmo": 12, "bmuf": 8, "diloco": 500, "easgd": 4}
"""The methods in which ranks step alone and exchange every so many steps, with the steps that they take by default."""
LOCAL = tuple(PERIODS)
SERVED = ("server-sync", "server-async", "server-staleness")
"""The methods that need server ranks (easgd may have one)."""
STRATEGIES = ("sync", "delayed", "dmb", "adasum", *LOCAL, "gossip", *SERVED, "hogwild")
OUTER = ("slowmo", "bmuf", "diloco")
BELONGS = {
    "period": LOCAL,
    "period-schedule": tuple(name for name in LOCAL if name != "post-local"),
    "switch": ("post-local",),
    "delay": ("delayed", "local", *OUTER, "gossip"),
    "resync-every": ("sync", "delayed", "dmb", "adasum"),
    "inner-state": LOCAL,
    "outer-lr": OUTER,
    "outer-momentum": OUTER,
    "fragments": ("diloco",),
    "mixing": ("diloco",),
    "elastic-beta": ("easgd",),
    "gossip": ("gossip",),
    "predict": ("dmb",),
    "servers": (*SERVED, "easgd"),
    "server-tree": SERVED,
    "push": ("server-async",),
    "fetch": ("server-async",),
    "softsync": ("server-staleness",),
    "no-staleness-lr": ("server-staleness",),
    "noise-scale": ("sync",),
    "virtual-ranks": ("sync",),
}
"""The strategies that take each of these flags."""
PERIOD_SCHEDULES = ("constant", "rising", "falling")
INNER_STATES = ("keep", "average", "reset")


@dataclass(frozen=True)
class StrategyOptions:
    strategy: str = option(
        "sync",
        "how SGD is distributed. Gradients averaged every step: sync, delayed (applied --delay steps late), dmb "
        "(samples that come meanwhile are only predicted), adasum. Ranks step alone and average models every --period "
        "steps: local, post-local, slowmo, bmuf, diloco, easgd (elastic). Neighbours average: gossip. Parameter "
        "servers, --servers ranks: server-sync, server-async (Downpour), server-staleness. One copy of the parameters "
        "for all ranks of a node, without locks: hogwild",
        choices=STRATEGIES,
    )
    period: int | None = option(
        None,
        "steps between two averages of models; not set: "
        + ", ".join(f"{steps} for {name}" for name, steps in PERIODS.items()),
        minimum=1,
    )
    period_schedule: str = option(
        "constant",
        "course of the period over the run: constant, rising (from 1 to --period) or falling (from --period to 1)",
        choices=PERIOD_SCHEDULES,
    )
    switch: str | None = option(
        None,
        "when post-local leaves synchronous for local steps: step:N, epoch:N or lr-drop (the schedule's first "
        "decrease); not set: half the run",
        metavar="WHEN",
    )
    delay: int | None = option(
        None,
        "steps that an exchange may take while training goes on; not set: 1 for delayed, 0 for the others "
        "(local, slowmo, bmuf, diloco and gossip can)",
        minimum=0,
    )
    resync_every: int | None = option(
        None, "steps between two broadcasts of rank 0's parameters, against numerical drift; not set: none", minimum=1
    )
    inner_state: str = option(
        "keep",
        "what becomes of each rank's optimizer state (momentum) when models are averaged: keep, average or reset",
        choices=INNER_STATES,
    )
    outer_lr: float | None = option(
        None, "step of the outer optimizer; not set: 1 for slowmo and bmuf, 0.7 for diloco", above=0
    )
    outer_momentum: float | None = option(
        None,
        "momentum of the outer optimizer; not set: 0.6 for slowmo, 1 - 1/ranks for bmuf, 0.9 for diloco",
        minimum=0,
    )
    fragments: int = option(1, "parts of the model that diloco exchanges in turn (streaming)", minimum=1)
    mixing: float = option(
        0.5, "share of its own model that a rank keeps when a late exchange of diloco arrives", minimum=0, maximum=1
    )
    elastic_beta: float = option(
        0.9, "easgd's pull between centre and ranks: alpha = elastic-beta / ranks", above=0, maximum=1
    )
    gossip: str = option(
        "average",
        "how neighbours on the ring mix: average (both neighbours, D-PSGD) or push-sum (one way)",
        choices=("average", "push-sum"),
    )
    predict: int | None = option(
        None, "samples per rank and step that dmb only predicts; not set: as many as it learns from", minimum=1
    )
    servers: int | None = option(
        None, "ranks that serve parameters, each its part; not set: 1 for the server methods, else 0", minimum=0
    )
    server_tree: int | None = option(
        None, "workers per leaf of a tree of servers: leaves add up gradients for one root; not set: no tree", minimum=1
    )
    push: int = option(1, "steps between two pushes of gradients to the servers (server-async)", minimum=1)
    fetch: int = option(1, "steps between two fetches of parameters from the servers (server-async)", minimum=1)
    softsync: int | None = option(
        None,
        "n of n-softsync: server-staleness applies every floor(workers / n) gradients; not set: the number of workers",
        minimum=1,
    )
    staleness_lr: bool = option(True, "server-staleness divides the step by the staleness of each gradient")
    noise_scale: int | None = option(
        None, "measure the gradient noise scale every so many steps (sync, from 2 ranks on); not set: never", minimum=1
    )
    virtual_ranks: int | None = option(
        None,
        "compute every mini-batch as that of so many ranks, a multiple of those started, which share them out (sync): "
        "training then gives the same bits on any number of ranks with equal --threads; --batch-size is per virtual "
        "rank; not set: off",
        minimum=1,
    )
    straggler: str | None = option(
        None, "slow rank R down F times, to see who suffers, e.g. 1:3; not set: none", metavar="R:F"
    )

    @property
    def steps_between(self) -> int:
        """The period in force: what was given, or the method's own; 1 for methods that exchange every step."""
        return self.period or PERIODS.get(self.strategy, 1)

    @property
    def server_ranks(self) -> int:
        """How many ranks serve parameters."""
        if self.servers is not None:
            return self.servers
        return 1 if self.strategy in SERVED else 0

    @property
    def served(self) -> bool:
        """Whether some ranks serve parameters to the others."""
        return self.strategy in SERVED or (self.strategy == "easgd" and self.server_ranks > 0)

    @property
    def needs_messages(self) -> bool:
        """Whether ranks send one another messages, or share memory, which not all back ends can."""
        return self.served or self.strategy in ("adasum", "gossip", "hogwild") or self.virtual_ranks is not None

    @property
    def late(self) -> int:
        """The delay in force, in steps."""
        return self.delay if self.delay is not None else int(self.strategy == "delayed")

    def predicted(self, ranks: int, batch: int) -> int:
        """Return how many samples of a step are only predicted by all ranks that train, beside a mini-batch of
        `batch` samples."""
        if self.strategy != "dmb":
            return 0
        return batch if self.predict is None else ranks * self.predict

    def slowed_by(self, rank: int) -> float:
        """Return the factor by which this rank is to be slowed down, 1 for not at all."""
        slow = self.slow_rank
        return slow[1] if slow is not None and slow[0] == rank else 1.0

    @property
    def slow_rank(self) -> tuple[int, float] | None:
        """The rank and the factor of --straggler. Raises ConfigError where it is not of the form R:F."""
        if self.straggler is None:
            return None
        rank, _, factor = self.straggler.partition(":")
        try:
            parsed = int(rank), float(factor)
        except ValueError:
            parsed = -1, 0.0
        if parsed[0] < 0 or not 1 <= parsed[1] < float("inf"):
            raise ConfigError(
                f"--straggler {self.straggler}: give R:F, a rank from 0 on and a factor of at least 1, such as 1:3"
            )
        return parsed

    @property
    def asynchronous(self) -> bool:
        """Whether ranks take samples at their own pace."""
        return self.strategy == "hogwild" or (self.served and self.strategy != "server-sync")
