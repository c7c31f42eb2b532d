"""Does the cost model tell how long an all-reduce takes? `mpirun -np N python -m benchmarks.simulation`.

Measures our all-reduce algorithms between the ranks of this job and between its first P' = 2, 4, 8, ... ranks. On every
second size, with as many ranks as there are cores (the largest P' that does not exceed them), α and β are fitted
(`cost_fit.py`); γ is measured by timing additions, and what a call costs without any message by timing all-reduces of
empty buffers. The event simulator (`allreduce_sgd/schedules/simulate.py`) then
predicts the sizes in between, and all sizes of smaller P', of which the fit knew nothing. Target: within 20 %.

Beyond the cores a rank also waits for its turn on a core, which α, β and γ know nothing of. The median of measured ÷
predicted over the fitted sizes, one for each P', is the oversubscription factor; with it the sizes in between are
predicted, and shown apart. It says what this scheduler makes of this many ranks, and is used for nothing else.

Last, the simulator follows far more ranks with the fitted prices, each rank with a core of its own: on a flat network,
or on nodes with a slower network between them, for which `--between` gives the prices.

Modelled: messages within one node as copied by the ranks' cores, a rank that sends and receives at once doing each at
half the rate; a network between nodes as sending and receiving at full rate. The schedules strictly step by step, with
segments of the length that the communicator takes where the algorithm is named: our executor looks ahead, so it may be
faster where an algorithm is cut into segments and something other than the ranks' cores carries them (`look_ahead` of
the simulator, not used here). Two levels are those of messages: within a node, too, the fitted link's, where the real
algorithm reads shared memory.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from allreduce_sgd.comm.choice import named_choice
from allreduce_sgd.comm.options import ALGORITHMS
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize, Network, Placement
from allreduce_sgd.topology import Topology
from benchmarks.arguments import (
    Parser,
    check_plotting,
    check_writable,
    latency_and_rate,
    names,
    positive_int,
    positive_ints,
)
from benchmarks.cost_measurement import DTYPE, Timing, connected, measure_all_reduces, measure_gamma
from benchmarks.message_sizes import message_sizes
from benchmarks.on_all_ranks import on_all_ranks
from benchmarks.prediction import compare, simulated_rows
from benchmarks.record import write_record
from benchmarks.simulation_tables import measured_tables, simulated_table

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Measure, predict, simulate; return the exit status: 0, or 2 for bad arguments. All ranks must call alike."""

    def run(topology: Topology, options: argparse.Namespace) -> None:
        timings, gamma_seconds_per_byte = _measure(topology, options)
        if topology.rank > 0:
            return
        programs = {name: ALL_REDUCE[name].columns(_segment(name)) for name in options.algorithms}
        # Within one node, messages go through memory, by the hands of the ranks' own cores.
        duplex, cores = topology.nodes > 1, topology.cores * topology.nodes
        rows, link = compare(timings, programs, gamma_seconds_per_byte, cores, options.regimes, duplex)
        print(measured_tables(rows))
        rows += simulated_rows(
            programs, options.simulate_ranks, options.simulate_sizes, _network(link, duplex, options)
        )
        print(f"\n{simulated_table(rows, _place(options))}")
        if options.json is not None:
            write_record(options.json, "simulation", arguments, rows)
        if options.plot is not None:
            from benchmarks.simulation_plot import plot_simulation

            plot_simulation(rows, f"all-reduce, simulated ({_place(options)})", options.plot)

    return on_all_ranks("simulation", lambda: _parse(arguments), _check_files, run)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("simulation", "Fit a cost model to measured all-reduces, test it, and simulate more ranks.")
    add = parser.add_argument
    add("--algorithms", default=",".join(ALL_REDUCE), metavar="NAMES", help="those the mpi back end has are measured")
    add("--sizes", type=message_sizes, default="4K:16M", metavar="SIZES", help="measured; every second one is fitted")
    add(
        "--regimes",
        type=positive_int,
        default=3,
        metavar="N",
        help="ranges of message size with an α and β of their own",
    )
    add("--rounds", type=positive_int, default=21, metavar="N", help="timed turns of each algorithm and size")
    add("--warmup", type=positive_int, default=3, metavar="N", help="untimed turns before them")
    add(
        "--simulate-ranks", type=positive_ints, default="2,16,256,4096,16384", metavar="NUMBERS", help="ranks simulated"
    )
    add("--simulate-sizes", type=message_sizes, default="64K,16M", metavar="SIZES", help="sizes simulated")
    add("--ranks-per-node", type=positive_int, metavar="N", help="simulate nodes; without it, a flat network")
    add(
        "--nics-per-node",
        type=positive_int,
        default=1,
        metavar="N",
        help="network interfaces that a node's ranks share",
    )
    add("--placement", choices=get_args(Placement), default="contiguous", help="of ranks on nodes")
    add("--between", type=latency_and_rate, metavar="US,GBIT", help="latency in µs and Gbit/s between nodes: 20,10")
    add("--timeout-seconds", type=positive_int, default=300, metavar="N", help="deadline of every wait")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    add("--plot", type=Path, metavar="FILE.png", help="draw simulated time against ranks here")
    options = parser.parse_args(arguments)
    options.algorithms = names("--algorithms", options.algorithms, tuple(ALL_REDUCE))
    options.measured = [name for name in options.algorithms if name in ALGORITHMS]
    if not options.measured:
        raise ConfigError(f"--algorithms: the mpi back end has none of these; choose from {', '.join(ALGORITHMS[1:])}")
    if len(options.sizes) < 3:
        raise ConfigError("--sizes: at least three are needed, two to fit and one to predict")
    if min(*options.sizes, *options.simulate_sizes) < DTYPE.itemsize:
        raise ConfigError(f"--sizes, --simulate-sizes: one element has {DTYPE.itemsize} bytes")
    if options.between is not None and options.ranks_per_node is None:
        raise ConfigError("--between: there is nothing between nodes without --ranks-per-node")
    return options


def _check_files(options: argparse.Namespace) -> None:
    check_writable("--json", options.json)
    check_writable("--plot", options.plot)
    check_plotting("--plot", options.plot)


def _segment(name: str) -> int | None:
    """Return the elements of a segment where the communicator is told to use this algorithm."""
    n_bytes = named_choice(name, nodes=1, shared_memory=False, deterministic=False).for_message(0).segment_bytes
    return None if n_bytes is None else n_bytes // DTYPE.itemsize


def _network(link: LinkBySize, duplex: bool, options: argparse.Namespace) -> Network:
    between = None
    if options.between is not None:
        latency_us, gigabits = options.between
        # Whatever a message has crossed, it is reduced by the same core.
        between = LinkBySize(
            link.limits_bytes,
            tuple(LinkCost(1e-6 * latency_us, 8e-9 / gigabits, cost.gamma_seconds_per_byte) for cost in link.costs),
        )
    return Network(link, between, options.ranks_per_node, options.nics_per_node, options.placement, duplex)


def _place(options: argparse.Namespace) -> str:
    if options.ranks_per_node is None:
        return "flat network"
    between = "as within" if options.between is None else "{:g} µs, {:g} Gbit/s".format(*options.between)
    return f"{options.ranks_per_node} ranks a node, {options.placement}, between nodes {between}"


def _measure(topology: Topology, options: argparse.Namespace) -> tuple[list[Timing], dict[int, float]]:
    torch.set_num_threads(1)
    numbers = [ranks for ranks in (1 << k for k in range(1, topology.size.bit_length())) if ranks < topology.size]
    timings: list[Timing] = []
    for ranks in [*numbers, topology.size]:
        with connected(topology, options.measured, ranks, options.timeout_seconds) as comms:
            timings += measure_all_reduces(
                topology, comms, ranks, (0, *options.sizes), options.warmup, options.rounds, options.timeout_seconds
            )
    largest_bytes = 2 * max(options.sizes)
    classes = [1 << k for k in range(largest_bytes.bit_length())]
    gamma = measure_gamma(topology, min(topology.size, topology.cores * topology.nodes), classes)
    return timings, gamma


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
