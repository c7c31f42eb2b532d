"""What does communication cost a training step? `mpirun -np N python -m benchmarks.step_time`.

Contenders (all in one run, one after another in every round, in an order that rotates, so that the drift of a noisy
machine hits all alike):

- alone             rank 0 computes, the other ranks sleep: what one core does with the machine to itself
- no_communication  all ranks compute at once and exchange nothing: alone, plus contention for memory and power
- allreduce_sgd     ours over the mpi back end, the fastest of its settings in this run
- torch_ddp_gloo    torch's DistributedDataParallel over Gloo, the fastest of its settings in this run
- allreduce_sgd_NAME, torch_ddp_gloo_NAME   likewise with the codec of `--compression NAME`, where torch has one

All compute in one thread per rank. In round r the time of a contender is the mean over its steps, and the maximum over
ranks; t = the median over rounds. `ratio` is the median over rounds of (its time in round r / that of
no_communication in round r): 1 means that communication is free. Exposed communication of ours is the time that the
training thread waits, and its backward leaves that out; torch's DDP does not tell, so that its backward contains it,
and what is called exposed is the median over rounds of (its time - that of no_communication).

Every round starts with one step whose gradients and parameters are checked against a serial step with the mini-batches
of all ranks, and whose outcome must be the same bits on all ranks; a wrong one ends the benchmark with status 1.

Between hosts `--bound` also measures how short a step could be at best (`overlap`). `--trace FILE` writes a timeline
of one more step of the fastest of ours. `step_memory` has what a step costs in memory.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from allreduce_sgd.chrome_trace import RankTrace, chrome_trace, write_trace
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.topology import Topology, discover, launcher_rank
from allreduce_sgd.trace import StepRecorder, gather_trace
from benchmarks.arguments import Parser, check_writable, names, positive_int
from benchmarks.contenders import OPTIMIZERS, Contender
from benchmarks.overlap import OverlapProbe, Parts
from benchmarks.record import write_record
from benchmarks.step_contenders import COMPRESSIONS, OURS, SETTINGS, Plan, close_gloo, contenders
from benchmarks.step_hooks import hook_seconds_per_parameter
from benchmarks.step_rounds import Schedule, measure_rounds
from benchmarks.step_rows import Setup, report, summarise
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["main"]

_UNTRACED_STEPS = 5


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit status: 0, or 2 for bad arguments. All ranks must call with the same arguments."""
    try:
        # Every rank parses, but only one prints --help.
        with contextlib.redirect_stdout(sys.stdout if launcher_rank(os.environ) == 0 else io.StringIO()):
            options = _parse(arguments)
        topology = discover(timeout_seconds=options.timeout_seconds)
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
        print(report(rows))
        if options.json is not None:
            write_record(options.json, "step_time", arguments, rows)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("step_time", "Measure what communication costs a training step; start it with mpirun -np N.")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), metavar="NAMES", help="separated by commas")
    parser.add_argument("--settings", default=",".join(SETTINGS), metavar="NAMES", help="of ours; the fastest counts")
    parser.add_argument(
        "--compression", default="none", metavar="NAMES", help=f"also ours with these codecs: {', '.join(COMPRESSIONS)}"
    )
    parser.add_argument("--optimizer", default="sgd", choices=tuple(OPTIMIZERS), help="of all contenders")
    parser.add_argument("--steps", type=positive_int, default=30, metavar="N", help="timed steps per round")
    parser.add_argument("--warmup", type=positive_int, default=5, metavar="N", help="untimed steps before them")
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="turns of each contender")
    parser.add_argument("--bound", action="store_true", help="also measure the parts of the overlap bound")
    parser.add_argument("--timeout-seconds", type=positive_int, default=300, metavar="N", help="deadline of every wait")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of one step of ours here")
    options = parser.parse_args(arguments)
    options.workloads = names("--workloads", options.workloads, tuple(WORKLOADS))
    options.settings = names("--settings", options.settings, SETTINGS)
    options.compression = names("--compression", options.compression, ("none", *COMPRESSIONS))
    return options


def _check_files(options: argparse.Namespace) -> None:
    check_writable("--json", options.json)
    check_writable("--trace", options.trace)


def _complain(problem: ConfigError) -> None:
    print(f"step_time: error: {problem}", file=sys.stderr, flush=True)


def _measure_all(topology: Topology, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    backend = "mpi" if topology.size > 1 else "single"
    ours = connect(topology, device, CommunicationOptions(backend, timeout_seconds=options.timeout_seconds))
    # This makes torch's default process group, which torch's DDP takes.
    gloo = connect(topology, device, CommunicationOptions("gloo", timeout_seconds=options.timeout_seconds))
    hook_seconds = hook_seconds_per_parameter(ours)
    rows: list[dict[str, Any]] = []
    traces: list[tuple[str, Sequence[RankTrace]]] = []
    for name in options.workloads:
        added, trace = _measure(name, topology, ours, options)
        for row in added:
            if row["contender"] == OURS:
                row["hook_seconds_per_parameter"] = hook_seconds
                traces += [] if trace is None else [(f"{name}, {OURS} {row['setting']}", trace)]
        rows += added
    if options.trace is not None and topology.rank == 0:
        write_trace(options.trace, chrome_trace(traces))
    ours.close()
    close_gloo(gloo)
    return rows


def _measure(
    name: str, topology: Topology, comm: Communicator, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], Sequence[RankTrace] | None]:
    """Return the rows of a workload, and the trace of one step of the fastest of ours where one is asked for."""
    workload = WORKLOADS[name]
    codecs = tuple(codec for codec in options.compression if codec != "none")
    field = list(contenders(workload, comm, Plan(options.settings, codecs, options.optimizer, topology.nodes)))
    probe = OverlapProbe(workload, comm, options.optimizer) if options.bound and topology.size > 1 else None
    parts: list[Parts] = []

    def measure_parts() -> None:
        if probe is not None:
            parts.append(probe.turn(options.steps))

    schedule = Schedule(options.rounds, options.warmup, options.steps)
    rounds = measure_rounds(name, workload, field, topology, comm, schedule, measure_parts)
    rows = summarise(name, Setup(topology.size, topology.nodes, options.optimizer), rounds, parts)
    # All ranks have the same times, and choose alike.
    fastest = [(row["contender"], row["setting"]) for row in rows if row["contender"] == OURS]
    chosen = [each for each in field if options.trace is not None and (each.name, each.setting) in fastest]
    return rows, _trace(chosen[0], workload, topology, comm) if chosen else None


def _trace(contender: Contender, workload: Workload, topology: Topology, comm: Communicator) -> list[RankTrace]:
    """Record one step of all ranks."""
    batch = workload.batch(topology.rank)
    recorder = StepRecorder(contender.replica, contender.stepper, comm)
    contender.turn(batch, _UNTRACED_STEPS)
    comm.barrier().wait()
    with recorder.recording():
        contender.step(batch)
    return gather_trace(recorder, comm)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
