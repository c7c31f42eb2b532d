"""The flags of `predict` and `advise` that say what connects the ranks, and what comes of them."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize, Network, Placement
from benchmarks.arguments import Parser, latency_and_rate, positive_int, positive_number
from benchmarks.scaling.accuracy import Accuracy, from_study
from benchmarks.scaling.presets import PRESETS
from benchmarks.scaling.profile import Compute, Profile
from benchmarks.scaling.reductions import ALGORITHM_CHOICES, Reductions
from benchmarks.scaling.stragglers import Stragglers, parse_stragglers

__all__ = [
    "Connection",
    "accuracy_of",
    "add_network_flags",
    "add_target_flags",
    "check_model",
    "connect_ranks",
    "stragglers_of",
]

_MEASURED = "measured"


@dataclass(frozen=True)
class Connection:
    """All-reduces in the network that the flags describe, and a line that describes it for people."""

    reductions: Reductions
    text: str


def add_network_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--profile", type=Path, required=True, metavar="FILE", help="record of `measure`")
    add(
        "--network",
        default=_MEASURED,
        metavar="NAME|US,GBIT",
        help=f"{_MEASURED} (the profile's), a latency in µs and a rate in Gbit/s per NIC, or one of "
        f"{', '.join(PRESETS)} (see `presets`)",
    )
    add("--ranks-per-node", type=positive_int, metavar="N", help="ranks that share a node; not set: the preset's, or 1")
    add("--nics-per-node", type=positive_int, metavar="N", help="interfaces that they share; not set: the preset's")
    add("--placement", choices=get_args(Placement), default="contiguous", help="of ranks on nodes")
    add(
        "--algorithm",
        choices=ALGORITHM_CHOICES,
        default="cheapest",
        help="of the all-reduce; cheapest: whichever is fastest for each bucket; auto: the communicator's own choice",
    )
    add(
        "--stragglers",
        default="fitted",
        metavar="WHICH",
        help="distribution of a rank's step times: fitted (the profile's), none, lognormal:SIGMA or exponential:SHARE",
    )


def add_target_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--study", type=Path, metavar="FILE", help="results.jsonl of a study, for the steps to its target")
    add("--s-min", type=positive_number, metavar="N", help="least number of steps to the target, instead of a study")
    add("--b-crit", type=positive_number, metavar="N", help="batch size at which it takes twice that many")


def connect_ranks(options: argparse.Namespace, profile: Profile) -> Connection:
    """Return what the flags describe. Raises ConfigError where they contradict each other."""
    measured = profile.link
    if options.network == _MEASURED:
        per_node, nics = options.ranks_per_node, options.nics_per_node
        if nics is not None and per_node is None:
            raise ConfigError("--nics-per-node: there are no nodes without --ranks-per-node")
        network = Network(measured, None, per_node, nics or 1, options.placement, profile.duplex)
        text = "the measured network" if profile.hosts > 1 else "all ranks joined as those of the measured host are"
        text += "" if per_node is None else f", {per_node} ranks a node"
        shared = {profile.ranks: profile.shared_seconds} if profile.shared_seconds else {}
        return Connection(Reductions(network, options.algorithm, profile.call_seconds, shared), text)
    preset = PRESETS.get(options.network)
    if preset is None:
        latency_us, gigabits = _prices_of(options.network)
        per_node, nics = options.ranks_per_node or 1, options.nics_per_node or 1
        between, inside = _priced(measured, latency_us, gigabits), measured
        text = f"{latency_us:g} µs, {gigabits:g} Gbit/s"
        duplex = profile.duplex
    else:
        per_node = options.ranks_per_node or preset.ranks_per_node
        nics = options.nics_per_node or preset.nics_per_node
        between, inside, duplex = _priced(measured, preset.latency_us, preset.gigabits), measured, profile.duplex
        if preset.inside_latency_us is not None and preset.inside_gigabits is not None:
            inside, duplex = _priced(measured, preset.inside_latency_us, preset.inside_gigabits), True
        text = f"{options.network} ({preset.latency_us:g} µs, {preset.gigabits:g} Gbit/s)"
    network = Network(inside, between, per_node, nics, options.placement, duplex)
    text = f"{text}, {per_node} rank{'s' if per_node > 1 else ''} and {nics} NIC{'s' if nics > 1 else ''} a node"
    if per_node > 1 and inside is measured:
        text += ", joined as those of the profile are"
    return Connection(Reductions(network, options.algorithm, profile.call_seconds), text)


def stragglers_of(options: argparse.Namespace, profile: Profile) -> Stragglers:
    """Raises ConfigError for what is no distribution."""
    if options.stragglers == "fitted":
        return profile.stragglers
    try:
        return parse_stragglers(options.stragglers)
    except argparse.ArgumentTypeError as problem:
        raise ConfigError(f"--stragglers: {problem}") from problem


def accuracy_of(options: argparse.Namespace) -> Accuracy | None:
    """Return what is known of the steps to the target; None where no flag says anything. Raises ConfigError."""
    given = (options.s_min, options.b_crit)
    if options.study is not None:
        if given != (None, None):
            raise ConfigError("--study: it has an S_min and a B_crit of its own; leave --s-min and --b-crit out")
        return from_study("--study", options.study)
    if given == (None, None):
        return None
    if None in given:
        raise ConfigError("--s-min, --b-crit: one needs the other")
    return Accuracy(*given, f"given: S_min {options.s_min:g}, B_crit {options.b_crit:g}")


def check_model(flag: str, accuracy: Accuracy, work: Compute) -> None:
    """Raise ConfigError where a study trained another model, or on other inputs, than the one whose steps are timed."""
    if accuracy.trained not in (None, work.model):
        raise ConfigError(f"{flag} {work.workload}: --study trained another model, {accuracy.trained}")


def _prices_of(text: str) -> tuple[float, float]:
    try:
        return latency_and_rate(text)
    except argparse.ArgumentTypeError as problem:
        known = ", ".join((_MEASURED, *PRESETS))
        raise ConfigError(f"--network: {text!r} is neither US,GBIT, such as 20,10, nor one of {known}") from problem


def _priced(measured: LinkBySize, latency_us: float, gigabits: float) -> LinkBySize:
    """Return a link with these prices; whatever a message has crossed, it is reduced by the same core."""
    prices = {"alpha_seconds": 1e-6 * latency_us, "beta_seconds_per_byte": 8e-9 / gigabits}
    costs: tuple[LinkCost, ...] = tuple(replace(cost, **prices) for cost in measured.costs)
    return LinkBySize(measured.limits_bytes, costs)
