"""How fast are collectives, and how near the machine's limit? `mpirun -np N python -m benchmarks.collectives`.

The columns are those of nccl-tests, with its formulas: algbw = n/t, busbw = algbw · 2(P-1)/P for an all-reduce. All
contenders are timed in one run, interleaved within rounds (`rounds`), on random data, and every element of every timed
result is checked (`collective_data`):

- peers: MPI_Allreduce in place, Gloo, Horovod, NCCL (`peers`)
- ours: each of `--algorithms`, in place and with one shared result; its asynchronous path, start and wait at once,
  takes turns of its own
- the floor: on one node the plain concurrent addition of n/P elements by all ranks (`memory_floor`), between hosts raw
  TCP over the same links (`raw_tcp`). Between hosts, more bytes per second on the links than raw TCP carries mean that
  the data went another way, which is reported as a bypass.

t is the maximum over ranks in each round, then the median over rounds. At one size the last rank also comes late, to
see what CPU time the others burn while they wait.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import ALGORITHMS, CommunicationOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.topology import Topology, discover, launcher_rank
from benchmarks.arguments import Parser, check_plotting, check_writable, names, positive_int
from benchmarks.collective_data import DTYPES, OPERATIONS, CollectiveData, bus_factor
from benchmarks.collective_report import report
from benchmarks.collective_rows import Setting, make_rows
from benchmarks.memory_floor import MemoryFloor
from benchmarks.message_sizes import format_size, message_sizes
from benchmarks.own_collectives import own_contenders, private_contenders
from benchmarks.peers import PEERS, Peers
from benchmarks.raw_tcp import RawTcp
from benchmarks.record import processor, write_record
from benchmarks.rounds import Contender, Turns, Wait, measure_rounds, measure_wait

__all__ = ["main"]

_FLOOR = "floor"
_LATE_REPETITIONS = 5
# Above this the collective itself takes CPU time that would count as burnt by waiting.
_LATE_BYTES = 1 << 20
_PLOTS = (".png", ".pdf", ".svg")
# Of the last minute and per core, before anything is measured.
_QUIET_LOAD = 0.5
_ADDING = ("all_reduce", "reduce_scatter")


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit status: 0; 1 where a result was wrong; 2 for bad arguments. All ranks must call."""
    try:
        # Every rank parses, but only one prints --help.
        with contextlib.redirect_stdout(sys.stdout if launcher_rank(os.environ) == 0 else io.StringIO()):
            options = _parse(arguments)
        topology = discover(timeout_seconds=options.timeout_seconds)
        if topology.size == 1:
            raise ConfigError("one rank has nobody to reduce with; start at least two: mpirun -np 2 python -m ...")
    except ConfigError as problem:
        if launcher_rank(os.environ) == 0:
            _complain(problem)
        return 2
    install_excepthooks(topology)
    try:
        topology.agree(lambda: _check_files(options) if topology.rank == 0 else None)
        rows = _measure_all(topology, options)
    except ConfigError as problem:
        if problem.rank in (None, topology.rank):
            _complain(problem)
        return 2
    if topology.rank == 0:
        print(report(rows), flush=True)
        if options.json is not None:
            write_record(options.json, "collectives", arguments, rows)
        if options.plot is not None:
            _plot(rows, options.plot)
    return 1 if any(row["wrong"] for row in rows) else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("collectives", "Measure collectives against their peers and the floor; start with mpirun -np N.")
    parser.add_argument("--sizes", type=message_sizes, default="4K:128M", metavar="SIZES", help="LOW:HIGH or A,B,...")
    parser.add_argument(
        "--peers", metavar="NAMES", help="of mpi, gloo, nccl, horovod; or none; unset: those of the device"
    )
    parser.add_argument("--algorithms", default="auto", metavar="NAMES", help=f"ours, of {', '.join(ALGORITHMS)}")
    parser.add_argument("--ops", default="all_reduce", metavar="NAMES", help=f"of {', '.join(OPERATIONS)}")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of the elements")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:K or auto")
    parser.add_argument("--private", action="store_true", help="also ours on tensors that it did not allocate")
    parser.add_argument("--warmup", type=positive_int, default=5, metavar="N", help="untimed rounds")
    parser.add_argument("--rounds", type=positive_int, default=20, metavar="N", help="timed rounds")
    parser.add_argument("--timeout-seconds", type=positive_int, default=300, metavar="N", help="deadline of every wait")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bus bandwidth against size here (.png)")
    options = parser.parse_args(arguments)
    options.algorithms = names("--algorithms", options.algorithms, ALGORITHMS)
    options.ops = names("--ops", options.ops, OPERATIONS)
    if options.peers is not None:
        options.peers = names("--peers", options.peers, (*PEERS, "none"))
    for size_bytes in options.sizes:
        if size_bytes % DTYPES[options.dtype].itemsize:
            raise ConfigError(f"--sizes: {size_bytes} bytes are not a whole number of {options.dtype} elements")
    if options.plot is not None and options.plot.suffix not in _PLOTS:
        raise ConfigError(f"--plot {options.plot}: the name must end in {', '.join(_PLOTS)}")
    return options


def _check_files(options: argparse.Namespace) -> None:
    check_writable("--json", options.json)
    check_writable("--plot", options.plot)
    check_plotting("--plot", options.plot)


def _complain(problem: ConfigError) -> None:
    print(f"collectives: error: {problem}", file=sys.stderr, flush=True)


def _measure_all(topology: Topology, options: argparse.Namespace) -> list[dict[str, Any]]:
    device = topology.agree(lambda: topology.choose_device(options.device))
    torch.set_num_threads(topology.threads_per_rank())
    dtype = DTYPES[options.dtype]
    wanted = options.peers or (("nccl",) if device.type == "cuda" else ("mpi", "gloo", "horovod"))
    peers = Peers(topology, device, tuple(each for each in wanted if each != "none"), options.timeout_seconds)
    if topology.rank == 0:
        for line in peers.left_out:
            print(line, flush=True)
        load = os.getloadavg()[0]
        if load > _QUIET_LOAD * topology.cores:
            print(
                f"load average {load:.1f} on {topology.cores} cores: something else runs here, and times will show it"
            )
    tcp = RawTcp(topology, options.timeout_seconds) if topology.nodes > 1 else None
    waits_bytes = max((size for size in options.sizes if size <= _LATE_BYTES), default=options.sizes[0])
    rows = []
    for operation in options.ops:
        largest = options.sizes[-1] // dtype.itemsize
        data = CollectiveData(operation, topology.rank, topology.size, largest, dtype)
        for size_bytes in options.sizes:
            rows += _measure_size(topology, device, peers, tcp, data, size_bytes, size_bytes == waits_bytes, options)
    if tcp is not None:
        tcp.close()
    peers.close()
    return rows


def _measure_size(
    topology: Topology,
    device: torch.device,
    peers: Peers,
    tcp: RawTcp | None,
    data: CollectiveData,
    size_bytes: int,
    with_waits: bool,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    dtype = DTYPES[options.dtype]
    count = size_bytes // dtype.itemsize
    if data.operation in ("all_gather", "reduce_scatter"):
        # As in nccl-tests: equal parts, which is all that some of the peers take.
        count -= count % topology.size
        if count == 0:
            return []
    field: list[Contender] = []
    for name in peers.names:
        buffer = torch.zeros(count, dtype=dtype, device=device)
        call = peers.call(name, data.operation, buffer)
        if call is not None:
            field.append(Contender(name, "in_place", False, buffer, call, data.region(count)))
    comms = []
    for name in options.algorithms:
        wanted = CommunicationOptions("mpi", algorithm=name, timeout_seconds=options.timeout_seconds)
        # One communicator per size, since what it allocates lives until it is closed.
        comms.append(connect(topology, device, wanted))
        field += own_contenders(comms[-1], name, data, count, dtype, device)
        if options.private:
            field += private_contenders(comms[-1], name, data, count, dtype, device)
    link_bytes = bus_factor(data.operation, topology.nodes) * count * dtype.itemsize
    tcp_bytes = 0
    if tcp is not None:
        tcp_bytes = tcp.prepare(link_bytes)
        nothing = torch.empty(0, dtype=dtype)
        field.append(Contender(_FLOOR, "", False, nothing, lambda: tcp.exchange(nothing), slice(0, 0)))
    elif data.operation in _ADDING and device.type == "cpu":
        floor = MemoryFloor(topology, count, dtype)
        field.append(Contender(_FLOOR, "", False, floor.bucket, floor.add, floor.region))

    silent = topology.rank > 0 or not sys.stderr.isatty()
    total = len(field) * (options.warmup + options.rounds)
    description = f"{data.operation} {format_size(size_bytes)}"
    with tqdm(total=total, desc=description, unit="turn", leave=False, disable=silent) as bar:
        turns = measure_rounds(
            topology, field, data, options.warmup, options.rounds, options.timeout_seconds, bar.update
        )
    results: list[tuple[Contender, Turns, Wait | None]] = []
    floor_seconds: float | None = None
    raw_rates: list[float] = []
    for each, measured in zip(field, turns, strict=True):
        if each.name != _FLOOR:
            wait = None
            if with_waits:
                wait = measure_wait(topology, each, data, _LATE_REPETITIONS, options.timeout_seconds)
            results.append((each, measured, wait))
            continue
        if measured.wrong:
            raise RuntimeError(f"{description}: the floor's own addition is wrong in {measured.wrong} elements")
        floor_seconds = statistics.median(measured.seconds)
        if tcp is not None:
            raw_rates = [tcp_bytes / seconds for seconds in measured.seconds]
            floor_seconds *= link_bytes / tcp_bytes
    for comm in comms:
        comm.close()
    setting = Setting(
        data.operation,
        options.dtype,
        count,
        count * dtype.itemsize,
        topology.size,
        topology.nodes,
        torch.get_num_threads(),
    )
    return make_rows(setting, results, floor_seconds, raw_rates)


def _plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    # matplotlib belongs to the extra "report", and takes a second to load.
    from benchmarks.bandwidth_plot import plot_bandwidth

    if rows:
        first = rows[0]
        hosts = "1 host" if first["hosts"] == 1 else f"{first['hosts']} hosts"
        plot_bandwidth(rows, f"{first['dtype']}, {first['ranks']} ranks on {hosts}, {processor()}", file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
