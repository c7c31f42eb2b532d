"""What does a step cost that exchanges only now and then? `mpirun -np N python -m benchmarks.local_steps`.

Local SGD with several periods, against the same strategy with a period that never ends: ranks that compute at once and
exchange nothing. All take the same number of steps in every round, one after another, in one thread per rank.

- ms per step   the maximum over ranks of the mean over a round's steps; median over rounds [minimum–maximum]
- ratio         median over rounds of that time / that of `never` in the same round; likewise
- kB sent       bytes sent per rank and step, counted where they are sent; on one node read out of a peer's memory

At the end of the rounds the models of all ranks are compared: averaged ones must be the same bits on all ranks.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import common_sha256
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.base import Share, Strategy
from allreduce_sgd.strategies.build import build_strategy
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.topology import discover, launcher_rank
from benchmarks.arguments import Parser, check_writable, names, positive_int, positive_ints
from benchmarks.ratios import ratio_columns, ratio_row
from benchmarks.record import write_record
from benchmarks.table import format_number, format_table
from benchmarks.workloads import WORKLOADS, Workload

__all__ = ["main", "measure"]

_NEVER = 10**9


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit status: 0, or 2 for bad arguments. All ranks must call with the same arguments."""
    try:
        with contextlib.redirect_stdout(sys.stdout if launcher_rank(os.environ) == 0 else io.StringIO()):
            options = _parse(arguments)
        topology = discover(timeout_seconds=60.0)
    except ConfigError as problem:
        if launcher_rank(os.environ) == 0:
            print(f"local_steps: error: {problem}", file=sys.stderr, flush=True)
        return 2
    install_excepthooks(topology)
    torch.set_num_threads(1)
    comm = connect(topology, torch.device("cpu"), CommunicationOptions(timeout_seconds=60.0))
    rows = [row for name in options.workloads for row in measure(name, comm, options)]
    if comm.rank == 0:
        print(f"{comm.size} ranks, one thread each; {options.steps} steps a round, {options.rounds} rounds\n")
        print(table(rows))
        if options.json is not None:
            write_record(options.json, "local_steps", arguments, rows)
    comm.close()
    return 0


def measure(name: str, comm: Communicator, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each period, the first one for ranks that never exchange. All ranks must call."""
    workload = WORKLOADS[name]
    strategies = {period: _strategy(workload, comm, period, options.delay) for period in options.periods}
    strategies = {_NEVER: _strategy(workload, comm, _NEVER, 0), **strategies}
    share = _share(workload, comm)
    seconds: dict[int, list[float]] = {period: [] for period in strategies}
    sent: dict[int, float | None] = {}
    for index in range(options.rounds):
        turns = list(strategies)
        for period in turns[index % len(turns) :] + turns[: index % len(turns)]:
            strategy = strategies[period]
            before = comm.traffic.bytes_sent
            seconds[period].append(_round(strategy, share, comm, options.steps))
            after = comm.traffic.bytes_sent
            sent[period] = None if before is None or after is None else (after - before) / options.steps
    for period in options.periods:
        strategies[period].finish()
        common_sha256(strategies[period].model, comm)
    return [
        {
            "workload": name,
            "period": None if period == _NEVER else period,
            "delay": 0 if period == _NEVER else options.delay,
            "ranks": comm.size,
            "steps": options.steps,
            **ratio_row(times, seconds[_NEVER]),
            "sent_bytes": sent[period],
        }
        for period, times in seconds.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["workload"],
            "never" if row["period"] is None else str(row["period"]),
            *ratio_columns(row),
            format_number(None if row["sent_bytes"] is None else row["sent_bytes"] / 1e3),
        ]
        for row in rows
    ]
    return format_table(["workload", "period", "ms per step", "ratio", "kB sent"], lines)


def _strategy(workload: Workload, comm: Communicator, period: int, delay: int) -> Strategy:
    options = StrategyOptions("local", period=period, delay=delay)
    # A small rate: models that have learnt their one mini-batch by heart compute with slow denormal numbers.
    optimizer = OptimizerOptions(lr=1e-4, momentum=0.9)
    return build_strategy(options, GradientOptions(), optimizer, workload.build(), comm)


def _share(workload: Workload, comm: Communicator) -> Share:
    inputs, labels = workload.batch(comm.rank)

    def loss(model: nn.Module) -> torch.Tensor:
        return functional.cross_entropy(model(inputs), labels)

    return Share([loss], workload.batch_size, workload.batch_size * comm.size)


def _round(strategy: Strategy, share: Share, comm: Communicator, steps: int) -> float:
    """Return the seconds per step of the slowest rank."""
    comm.barrier().wait()
    started = time.perf_counter()
    for _ in range(steps):
        strategy.step(share)
    own = torch.tensor([(time.perf_counter() - started) / steps], dtype=torch.float64)
    return float(comm.all_reduce(own, ReduceOp.MAX).wait())


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("local_steps", "Measure steps of local SGD against steps without communication.")
    add = parser.add_argument
    add("--workloads", default="mlp512-b16", metavar="NAMES", help=f"of {', '.join(WORKLOADS)}")
    add("--periods", type=positive_ints, default="1,8,64", metavar="N,...", help="steps between two averages")
    add("--delay", type=int, default=0, metavar="N", help="steps that an average may take, fewer than all periods")
    add("--steps", type=positive_int, default=192, metavar="N", help="steps a round; best a multiple of all periods")
    add("--rounds", type=positive_int, default=15, metavar="N", help="rounds, of which the median counts")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    options.workloads = names("--workloads", options.workloads, tuple(WORKLOADS))
    if not 0 <= options.delay < min(options.periods):
        raise ConfigError(f"--delay {options.delay}: choose 0 to {min(options.periods) - 1}, less than every period")
    check_writable("--json", options.json)
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
