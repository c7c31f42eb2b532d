"""validate: predict step times that the prediction knows nothing of, measure them, and print the error.

Measured are steps of DistributedDataParallel, `--hold-out`. Predicted they are twice from what was measured in the same
rounds: with the workload's own computing, so that the network, buckets, overlap and stragglers are tested, and with
computing modelled from the workloads of `--fit` alone. With `--profile` everything comes from an earlier record, so
that other numbers of ranks and other networks are predicted from that one:

- `--from-gbit A --to-gbit B`: the profile was measured over links of A Gbit/s, this is run over links of B
  (`launch/virtual_hosts.sh --rate`); of its prices only β changes
- more ranks than cores: predictions times a factor for sharing cores, the median of measured ÷ predicted over `--fit`;
  these are reported apart, since they say little about ranks with a core each

`--records` needs no ranks: it holds recorded runs of `step_time --bound` against what their parts make expect.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules.simulate import LinkBySize
from allreduce_sgd.topology import Topology
from benchmarks.arguments import Parser, check_writable, positive_number
from benchmarks.on_all_ranks import on_all_ranks
from benchmarks.overlap import Parts, overlap_bound
from benchmarks.record import write_record
from benchmarks.scaling.calibrate import predicted_step
from benchmarks.scaling.compute import can_model, compute_like, workload
from benchmarks.scaling.folder import check_folder, draw_figures
from benchmarks.scaling.measure import add_measuring_flags, check_measuring, cores_in_all, profile_of, workload_names
from benchmarks.scaling.measurement import ComputeProbe, measure_network
from benchmarks.scaling.profile import Compute, Profile, read_profile
from benchmarks.scaling.step_probe import Measured, StepProbe
from benchmarks.scaling.tables import profile_table, validation_tables
from benchmarks.step_hooks import hook_seconds_per_parameter

__all__ = ["at_rate", "main", "predicted_rows", "recorded_rows"]

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Validate, print and write. Raises ConfigError for bad arguments; all ranks must call with the same ones."""
    if any(argument.split("=")[0] == "--records" for argument in arguments):
        options = _parse(arguments)
        _check(options)
        _report([row for path in options.records for row in recorded_rows(path)], [], options, arguments)
        return 0

    def run(topology: Topology, options: argparse.Namespace) -> None:
        cores = cores_in_all(topology)
        topology.agree(lambda: _check_ranks(topology.size, cores, options) if topology.rank == 0 else None)
        profile, measured, own = _measure(topology, cores, options)
        if options.to_gbit is not None:
            profile = replace(profile, link=at_rate(profile.link, options.from_gbit, options.to_gbit))

        def conclude() -> None:
            rows = predicted_rows(profile, own, measured, options.fit, topology.nodes, _network_label(options), cores)
            print(f"{profile_table(profile)}\n")
            _report(rows, profile.rows(), options, arguments)

        topology.agree(lambda: conclude() if topology.rank == 0 else None)

    return on_all_ranks("scaling", lambda: _parse(arguments), _check, run)


def predicted_rows(
    profile: Profile,
    own: Mapping[str, Compute],
    measured: Mapping[str, Measured],
    fit: Sequence[str],
    hosts: int,
    network: str,
    cores: int,
) -> list[Row]:
    """Return a row for each held-out workload of `measured` (all but `fit`) and kind of computing.

    `own` are measurements of held-out workloads themselves. Where steps were measured with more ranks than `cores`,
    workloads of `fit` that are in `measured` give the factor of sharing cores.
    """
    ranks = next(iter(measured.values())).ranks
    crowded = ranks > cores
    factor = None
    if crowded:
        known = {each.workload: each for each in profile.computes}
        learnt = [name for name in measured if name in fit and name in known]
        factor = statistics.median(
            measured[name].median_seconds / predicted_step(profile, known[name], ranks, hosts) for name in learnt
        )
    basis = [each for each in profile.computes if each.workload in fit]
    rows = []
    for name, result in measured.items():
        if name in fit:
            continue
        sizes = tuple(parameter.nbytes for parameter in workload(name).build().parameters())
        computes = {"measured": own[name]} if name in own else {}
        if can_model(name, [each.workload for each in basis]):
            computes["modelled"] = compute_like(basis, name, sizes)
        for computing, compute in computes.items():
            predicted = predicted_step(profile, compute, ranks, hosts) * (1.0 if factor is None else factor)
            rows.append(_row(result, hosts, network, computing, factor, predicted))
    return rows


def recorded_rows(path: Path) -> list[Row]:
    """Return a row for each recorded step of ours with parts. Raises ConfigError where the file has none."""
    rows = []
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if row["contender"] != "allreduce_sgd" or "bucket_ready_seconds" not in row:
                continue
            forward, backward, optimizer = row["compute_seconds"]
            parts = Parts(
                forward,
                row["bucket_ready_seconds"],
                backward,
                optimizer,
                row["bucket_reduction_seconds"],
                row["contention"],
            )
            times = (row["median_seconds"], row["minimum_seconds"], row["maximum_seconds"])
            measured = Measured(row["workload"], row["ranks"], *times, row["rounds"])
            label = f"recorded: {path.name}"
            rows.append(_row(measured, row["hosts"], label, "measured", None, overlap_bound(parts)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else f"not understood: {problem!r}"
        raise ConfigError(f"--records {path}: no record of step_time ({reason})") from problem
    if not rows:
        raise ConfigError(f"--records {path}: no step of ours was measured with --bound")
    return rows


def at_rate(link: LinkBySize, from_gbit: float, to_gbit: float) -> LinkBySize:
    """Return the link where the nominal rate is another.

    What a byte costs beyond the nominal price stays. A price below it, of messages short enough for the burst that a
    limited link lets through, changes by the ratio of the rates.
    """
    nominal, wanted = 8e-9 / from_gbit, 8e-9 / to_gbit

    def change(beta: float) -> float:
        return wanted + beta - nominal if beta >= nominal else beta * wanted / nominal

    costs = tuple(replace(cost, beta_seconds_per_byte=change(cost.beta_seconds_per_byte)) for cost in link.costs)
    return LinkBySize(link.limits_bytes, costs)


def _check_ranks(ranks: int, cores: int, options: argparse.Namespace) -> None:
    profile: Profile | None = options.given
    if profile is None:
        if ranks > cores:
            raise ConfigError("--profile: more ranks than cores are predicted from a profile of fewer ranks")
        return
    if ranks > cores and not options.fit:
        raise ConfigError(
            "--hold-out: more ranks than cores need other workloads of the profile to learn a factor from"
        )
    if ranks == profile.ranks and options.to_gbit is None:
        # Prices of handing over, and stragglers, were fitted to the very steps.
        seen = {each.workload for each in profile.computes}
        for name in options.hold_out:
            if name in seen:
                raise ConfigError(
                    f"--hold-out: {name} is in the profile, of {ranks} ranks too, and nothing would be held out; "
                    f"choose other workloads, or start another number of ranks"
                )


def _measure(
    topology: Topology, cores: int, options: argparse.Namespace
) -> tuple[Profile, dict[str, Measured], dict[str, Compute]]:
    torch.set_num_threads(1)
    profile: Profile | None = options.given
    crowded = topology.size > cores
    communication = CommunicationOptions("mpi", timeout_seconds=options.timeout_seconds)
    comm = connect(topology, torch.device("cpu"), communication)
    computed = (*options.fit, *options.hold_out) if profile is None else ()
    stepped = (*options.fit, *options.hold_out) if crowded or profile is None else options.hold_out
    probes = {name: ComputeProbe(name, topology, comm) for name in computed}
    steps = {name: StepProbe(name, topology, comm) for name in stepped}
    turns = [each for _ in range(options.rounds) for each in (*probes.values(), *steps.values())]
    silent = topology.rank > 0 or not sys.stderr.isatty()
    for each in tqdm(turns, desc="measuring", unit="turn", leave=False, disable=silent):
        each.turn(options.steps)
    own = {name: probe.result() for name, probe in probes.items()}
    measured = {name: probe.result() for name, probe in steps.items()}
    if profile is None:
        hook_seconds = hook_seconds_per_parameter(comm)
    comm.close()
    if profile is None:
        rounds = 3 * options.rounds
        prices = measure_network(topology, cores, options.algorithms, options.sizes, rounds, options.timeout_seconds)
        factors = [factor for name in options.fit for factor in own[name][1]]
        fitted = [own[name][0] for name in options.fit]
        profile = profile_of(topology, fitted, factors, prices, hook_seconds, measured)
    known = {each.workload: each for each in profile.computes} | {name: own[name][0] for name in own}
    return profile, measured, {name: known[name] for name in options.hold_out if name in known}


def _row(
    measured: Measured, hosts: int, network: str, computing: str, factor: float | None, predicted_seconds: float
) -> Row:
    return {
        "kind": "validation",
        "simulated": True,
        "workload": measured.workload,
        "ranks": measured.ranks,
        "hosts": hosts,
        "network": network,
        "computing": computing,
        "oversubscription": factor,
        "measured_seconds": measured.median_seconds,
        "minimum_seconds": measured.minimum_seconds,
        "maximum_seconds": measured.maximum_seconds,
        "rounds": measured.rounds,
        "predicted_seconds": predicted_seconds,
        "error": predicted_seconds / measured.median_seconds - 1,
    }


def _network_label(options: argparse.Namespace) -> str:
    if options.to_gbit is not None:
        return f"{options.from_gbit:g} → {options.to_gbit:g} Gbit/s"
    return "measured here" if options.given is None else f"of {options.profile.name}"


def _report(rows: list[Row], others: list[Row], options: argparse.Namespace, arguments: Sequence[str]) -> None:
    print(validation_tables(rows))
    if options.json is not None:
        write_record(options.json, "scaling", ["validate", *arguments], [*rows, *others])
    draw_figures(rows, options.figures)


def _check(options: argparse.Namespace) -> None:
    check_writable("--json", options.json)
    check_folder("--figures", options.figures)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("scaling validate", "Predict held-out step times and measure them; start it with mpirun -np N.")
    add = parser.add_argument
    add(
        "--fit",
        default="mlp256-b16,mlp256-b64,mlp1024-b16,mlp1024-b64,mlp2048-b32,cnn-b16,cnn-b128",
        metavar="NAMES",
        help="workloads that computing is modelled from",
    )
    add(
        "--hold-out",
        default="mlp512-b16,mlp512-b64,mlp1024-b32,mlp2048-b64,cnn-b64",
        metavar="NAMES",
        help="workloads whose steps are predicted",
    )
    add("--profile", type=Path, metavar="FILE", help="record of `measure` or `validate` to predict from")
    add("--from-gbit", type=positive_number, metavar="N", help="nominal rate of the links of the profile")
    add("--to-gbit", type=positive_number, metavar="N", help="nominal rate of the links of this run")
    add("--records", type=Path, nargs="+", metavar="FILE", help="recorded runs of step_time --bound, instead of ranks")
    add_measuring_flags(parser)
    add("--figures", type=Path, metavar="DIR", help="draw PNGs into this folder")
    options = parser.parse_args(arguments)
    options.fit, options.hold_out = (
        workload_names(flag, text) for flag, text in (("--fit", options.fit), ("--hold-out", options.hold_out))
    )
    both = [name for name in options.hold_out if name in options.fit]
    if both and options.profile is None:
        raise ConfigError(f"--hold-out: {both[0]} is in --fit too")
    if (options.from_gbit is None) != (options.to_gbit is None):
        raise ConfigError("--from-gbit, --to-gbit: one needs the other")
    if options.to_gbit is not None and options.profile is None:
        raise ConfigError("--to-gbit: the other rate's --profile is missing")
    check_measuring(options)
    options.given = None if options.profile is None else read_profile("--profile", options.profile)
    if options.given is not None:
        options.fit = tuple(each.workload for each in options.given.computes if each.workload not in options.hold_out)
    known = () if options.given is None else tuple(each.workload for each in options.given.computes)
    for name in () if options.records else options.hold_out:
        if name not in known and not can_model(name, options.fit):
            raise ConfigError(
                f"--hold-out: {name} cannot be modelled; --fit needs two other batch sizes of the same model, or for "
                f"an mlp three other mlps"
            )
    return options
