"""measure: what this machine computes and communicates, as the profile from which everything else is predicted."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.topology import Topology
from benchmarks.arguments import Parser, check_writable, names, positive_int
from benchmarks.message_sizes import message_sizes
from benchmarks.on_all_ranks import on_all_ranks
from benchmarks.record import write_record
from benchmarks.scaling.calibrate import calibrated
from benchmarks.scaling.codecs import CODEC_NAMES
from benchmarks.scaling.compute import workload
from benchmarks.scaling.handling import Handling
from benchmarks.scaling.measurement import ComputeProbe, NetworkPrices, codec_seconds_per_byte, measure_network
from benchmarks.scaling.profile import Compute, Profile
from benchmarks.scaling.step_probe import Measured, StepProbe
from benchmarks.scaling.stragglers import fit_stragglers
from benchmarks.scaling.tables import profile_table
from benchmarks.step_hooks import hook_seconds_per_parameter

__all__ = ["add_measuring_flags", "check_measuring", "main", "profile_of", "workload_names"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CODECS = tuple(name for name in CODEC_NAMES if name != "none")


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write. Raises ConfigError for bad arguments; all ranks must call with the same ones."""

    def check(options: argparse.Namespace) -> None:
        check_writable("--json", options.json)

    def run(topology: Topology, options: argparse.Namespace) -> None:
        profile = _measure(topology, options)
        if topology.rank == 0:
            print(profile_table(profile))
            if options.json is not None:
                write_record(options.json, "scaling", ["measure", *arguments], profile.rows())

    return on_all_ranks("scaling", lambda: _parse(arguments), check, run)


def add_measuring_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--algorithms", default="ring,recursive-doubling,halving-doubling", metavar="NAMES", help="to fit α and β with")
    add("--sizes", type=message_sizes, default="4K:16M", metavar="SIZES", help="of the all-reduces measured")
    add("--steps", type=positive_int, default=20, metavar="N", help="timed steps of a workload and round")
    add("--rounds", type=positive_int, default=7, metavar="N", help="turns of each workload, and of three of each size")
    add("--timeout-seconds", type=positive_int, default=300, metavar="N", help="deadline of every wait")
    add("--json", type=Path, metavar="FILE", help="write the record here")


def check_measuring(options: argparse.Namespace) -> None:
    """Raises ConfigError."""
    options.algorithms = names("--algorithms", options.algorithms, tuple(ALL_REDUCE))
    if len(options.sizes) < 3 or options.sizes[0] < 4:
        raise ConfigError("--sizes: at least three of 4 bytes or more are needed")


def workload_names(flag: str, text: str) -> tuple[str, ...]:
    """Return the workloads, separated by commas. Raises ConfigError for one that there is none of."""
    given = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    for name in given:
        try:
            workload(name)
        except ConfigError as problem:
            raise ConfigError(f"{flag}: {problem}") from problem
    return given


def profile_of(
    topology: Topology,
    computes: Sequence[Compute],
    factors: Sequence[float],
    prices: NetworkPrices,
    hook_seconds: float,
    steps: Mapping[str, Measured],
    codecs: Sequence[tuple[str, float]] = (),
) -> Profile:
    """Put a profile together; `steps` are measured steps of its workloads. All ranks must call."""
    profile = Profile(
        computes=tuple(computes),
        link=prices.link,
        call_seconds=prices.call_seconds,
        duplex=prices.duplex,
        ranks=topology.size,
        hosts=topology.nodes,
        cores=cores_in_all(topology),
        shared_seconds=prices.shared_seconds,
        stragglers=fit_stragglers(factors),
        handling=Handling(max(0.0, hook_seconds)),
        codec_seconds_per_byte=tuple(codecs),
    )
    return calibrated(profile, steps)


def cores_in_all(topology: Topology) -> int:
    """Return the cores of all machines, each counted once: virtual hosts share theirs. All ranks must call."""
    try:
        machine = _BOOT_ID.read_text(encoding="ascii")
    except OSError:
        # Not Linux: the nodes are taken for machines of their own.
        machine = topology.host
    return sum(dict(topology.gather_all((machine, topology.cores))).values())


def _measure(topology: Topology, options: argparse.Namespace) -> Profile:
    cores = cores_in_all(topology)

    def check() -> None:
        if topology.size > cores:
            raise ConfigError(
                f"mpirun -np {topology.size}: more ranks than the {cores} cores would measure how cores are shared; "
                f"start at most {cores}"
            )

    topology.agree(lambda: check() if topology.rank == 0 else None)
    torch.set_num_threads(1)
    communication = CommunicationOptions("mpi", timeout_seconds=options.timeout_seconds)
    comm = connect(topology, torch.device("cpu"), communication)
    probes = [ComputeProbe(name, topology, comm) for name in options.workloads]
    steps = [StepProbe(name, topology, comm) for name in options.workloads]
    pairs = list(zip(probes, steps, strict=True))
    turns = [each for _ in range(options.rounds) for pair in pairs for each in pair]
    silent = topology.rank > 0 or not sys.stderr.isatty()
    for probe in tqdm(turns, desc="stepping", unit="turn", leave=False, disable=silent):
        probe.turn(options.steps)
    results = [probe.result() for probe in probes]
    stepped = dict(zip(options.workloads, [step.result() for step in steps], strict=True))
    hook_seconds = hook_seconds_per_parameter(comm)
    comm.close()
    prices = measure_network(
        topology, cores, options.algorithms, options.sizes, 3 * options.rounds, options.timeout_seconds
    )
    codecs = [(name, codec_seconds_per_byte(name)) for name in options.codecs]
    factors = [factor for _, each in results for factor in each]
    return profile_of(topology, [compute for compute, _ in results], factors, prices, hook_seconds, stepped, codecs)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("scaling measure", "Measure the profile of this machine; start it with mpirun -np N.")
    add = parser.add_argument
    add(
        "--workloads",
        default="mlp512-b16,mlp512-b64,mlp512-b256,mlp2048-b16,mlp2048-b64,cnn-b16,cnn-b64",
        metavar="NAMES",
        help="mlpW-bB (two hidden layers of W, batch B) and cnn-bB; best several batches of each model",
    )
    add("--codecs", default="fp16,int8,sign", metavar="NAMES", help=f"timed alone: of {', '.join(_CODECS)}, or none")
    add_measuring_flags(parser)
    options = parser.parse_args(arguments)
    options.workloads = workload_names("--workloads", options.workloads)
    options.codecs = () if options.codecs == "none" else names("--codecs", options.codecs, _CODECS)
    check_measuring(options)
    return options
