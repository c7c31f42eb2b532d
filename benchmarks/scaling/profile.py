"""A compute profile: what one machine measured of its computing and its communication, as rows of a record.

`measure` writes it, all predictions start from it. Seconds are medians over rounds of means over steps; of computing
the mean over ranks, since what the slowest rank adds is predicted from the distribution of step times.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize
from benchmarks.scaling.handling import NO_HANDLING, Handling
from benchmarks.scaling.stragglers import NO_STRAGGLERS, Stragglers

__all__ = ["Compute", "Profile", "read_profile"]


@dataclass(frozen=True)
class Compute:
    """One workload: seconds of its phases, and when the gradient of each parameter is there.

    `arrival_seconds[i]`, of parameter i in the order of the module, counts from the beginning of the backward pass.
    `contention` is the factor by which computing is slower while a reduction is under way, at least 1.
    """

    workload: str
    batch_size: int
    parameter_bytes: tuple[int, ...]
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    arrival_seconds: tuple[float, ...]
    contention: float

    @property
    def model(self) -> str:
        """The workload's name without its batch size."""
        return self.workload.rpartition("-b")[0] or self.workload

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds + self.optimizer_seconds

    @property
    def total_bytes(self) -> int:
        return sum(self.parameter_bytes)


@dataclass(frozen=True)
class Profile:
    """What was measured with `ranks` ranks on `hosts` hosts, `cores` cores in all.

    `link` is what messages cost, fitted; `call_seconds` what an all-reduce costs without any; `duplex` whether a rank
    sends and receives at full rate at once. `shared_seconds` are all-reduces through the memory of one node, by
    bytes, empty where there are none. `codec_seconds_per_byte` is encoding and decoding, per byte before it, by codec.
    """

    computes: tuple[Compute, ...]
    link: LinkBySize
    call_seconds: float = 0.0
    duplex: bool = True
    ranks: int = 1
    hosts: int = 1
    cores: int = 1
    shared_seconds: tuple[tuple[int, float], ...] = ()
    stragglers: Stragglers = NO_STRAGGLERS
    handling: Handling = NO_HANDLING
    codec_seconds_per_byte: tuple[tuple[str, float], ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the record, from which `from_rows` makes the same profile."""
        machine = {name: getattr(self, name) for name in ("ranks", "hosts", "cores", "duplex")}
        costs: list[dict[str, Any]] = [
            {"largest_message_bytes": limit, **vars(cost)}
            for limit, cost in zip([*self.link.limits_bytes, None], self.link.costs, strict=True)
        ]
        return [
            {"kind": "profile", "part": "machine", **machine},
            {"kind": "profile", "part": "link", "call_seconds": self.call_seconds, "costs": costs},
            {"kind": "profile", "part": "shared_memory", "seconds": [list(each) for each in self.shared_seconds]},
            {"kind": "profile", "part": "stragglers", "distribution": self.stragglers.kind, **_spread(self.stragglers)},
            {"kind": "profile", "part": "handling", **asdict(self.handling)},
            {"kind": "profile", "part": "codecs", "seconds_per_byte": dict(self.codec_seconds_per_byte)},
            *({"kind": "profile", "part": "compute", **asdict(each)} for each in self.computes),
        ]

    @staticmethod
    def from_rows(rows: Sequence[Mapping[str, Any]]) -> "Profile":
        """The inverse of `rows`; other kinds of rows are ignored. Raises KeyError, TypeError and ValueError."""
        mine = [dict(row) for row in rows if row["kind"] == "profile"]
        parts = {row["part"]: row for row in mine if row["part"] != "compute"}
        costs = parts["link"]["costs"]
        prices = ("alpha_seconds", "beta_seconds_per_byte", "gamma_seconds_per_byte")
        limits = tuple(int(cost["largest_message_bytes"]) for cost in costs[:-1])
        link = LinkBySize(limits, tuple(LinkCost(*(float(cost[name]) for name in prices)) for cost in costs))
        computes = [{key: row[key] for key in Compute.__dataclass_fields__} for row in mine if row["part"] == "compute"]
        machine = parts["machine"]
        return Profile(
            computes=tuple(Compute(**{key: _frozen(value) for key, value in each.items()}) for each in computes),
            link=link,
            call_seconds=float(parts["link"]["call_seconds"]),
            **{name: machine[name] for name in ("ranks", "hosts", "cores", "duplex")},
            shared_seconds=tuple((int(n_bytes), float(each)) for n_bytes, each in parts["shared_memory"]["seconds"]),
            stragglers=Stragglers(parts["stragglers"]["distribution"], float(parts["stragglers"]["spread"])),
            handling=Handling(*(float(parts["handling"][name]) for name in Handling.__dataclass_fields__)),
            codec_seconds_per_byte=tuple(parts["codecs"]["seconds_per_byte"].items()),
        )


def read_profile(flag: str, path: Path) -> Profile:
    """Read a record of `measure` or `validate`. Raises ConfigError where it holds no profile."""
    try:
        profile = Profile.from_rows(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else f"not understood: {problem!r}"
        raise ConfigError(
            f"{flag} {path}: no record of `python -m benchmarks.scaling measure --json FILE` ({reason})"
        ) from problem
    if not profile.computes:
        raise ConfigError(f"{flag} {path}: the record holds no workload")
    return profile


def _spread(stragglers: Stragglers) -> dict[str, float]:
    return {"spread": stragglers.spread}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
