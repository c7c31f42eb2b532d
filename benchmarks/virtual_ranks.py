"""What does a result that does not depend on the ranks cost? `mpirun -np N python -m benchmarks.virtual_ranks`.

Steps of synchronous SGD with virtual ranks, some multiples of the ranks started, against plain synchronous SGD on the
same mini-batches: as the trainer has it by default, and with an optimizer that is not sharded, as virtual ranks need.
All take the same number of steps in every round, in turns, in one thread per rank.

- ms per step   the maximum over ranks of the mean over a round's steps; median over rounds [minimum–maximum]
- ratio         median over rounds of that time / that of `sync` in the same round; likewise
- kB sent       bytes sent per rank and step, counted where they are sent; on one node read out of a peer's memory
- wrong         whether the parameters after a few steps differ from those of the same steps on one rank alone, in any
                bit; for plain synchronous SGD, which promises only equal ones on all ranks, whether ranks differ
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from allreduce_sgd.comm.base import Communicator, ReduceOp
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.data.sampling import share
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.gradients.replicate import parameters_sha256
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

__all__ = ["main", "measure", "table"]

_CHECKED_STEPS = 3


class _Contender(NamedTuple):
    name: str
    virtual_ranks: int | None


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit status: 0, 1 where bits differ, or 2 for bad arguments. All ranks must call."""
    try:
        with contextlib.redirect_stdout(sys.stdout if launcher_rank(os.environ) == 0 else io.StringIO()):
            options = _parse(arguments)
        topology = discover(timeout_seconds=60.0)
    except ConfigError as problem:
        if launcher_rank(os.environ) == 0:
            print(f"virtual_ranks: error: {problem}", file=sys.stderr, flush=True)
        return 2
    install_excepthooks(topology)
    torch.set_num_threads(1)
    comm = connect(topology, torch.device("cpu"), CommunicationOptions(backend="mpi", timeout_seconds=60.0))
    rows = [row for name in options.workloads for row in measure(name, comm, options)]
    if comm.rank == 0:
        print(f"{comm.size} ranks, one thread each; {options.steps} steps a round, {options.rounds} rounds\n")
        print(table(rows))
        if options.json is not None:
            write_record(options.json, "virtual_ranks", arguments, rows)
    comm.close()
    return int(any(row["wrong"] for row in rows))


def measure(name: str, comm: Communicator, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each contender, plain synchronous SGD first. All ranks must call; all get the same `wrong`."""
    workload = WORKLOADS[name]
    contenders = [_Contender("sync", None), _Contender("sync_unsharded", None)]
    contenders += [_Contender("virtual", multiple * comm.size) for multiple in options.multiples]
    batch = _whole_batch(workload, comm.size)
    strategies = {each: _strategy(workload, comm, each) for each in contenders}
    shares = {each: _share(batch, comm, each) for each in contenders}
    seconds: dict[_Contender, list[float]] = {each: [] for each in contenders}
    sent: dict[_Contender, float | None] = {}
    for index in range(options.rounds):
        for each in contenders[index % len(contenders) :] + contenders[: index % len(contenders)]:
            before = comm.traffic.bytes_sent
            seconds[each].append(_round(strategies[each], shares[each], comm, options.steps))
            after = comm.traffic.bytes_sent
            sent[each] = None if before is None or after is None else (after - before) / options.steps
    return [
        {
            "workload": name,
            "contender": each.name,
            "virtual_ranks": each.virtual_ranks,
            "ranks": comm.size,
            "global_batch_size": len(batch[0]),
            "steps": options.steps,
            **ratio_row(seconds[each], seconds[contenders[0]]),
            "sent_bytes": sent[each],
            "wrong": _wrong(workload, batch, comm, each),
        }
        for each in contenders
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["workload"],
            row["contender"] if row["virtual_ranks"] is None else f"{row['virtual_ranks']} virtual ranks",
            *ratio_columns(row),
            format_number(None if row["sent_bytes"] is None else row["sent_bytes"] / 1e3),
            "wrong" if row["wrong"] else "no",
        ]
        for row in rows
    ]
    return format_table(["workload", "contender", "ms per step", "ratio", "kB sent", "wrong"], lines)


def _strategy(workload: Workload, comm: Communicator, contender: _Contender) -> Strategy:
    options = StrategyOptions(virtual_ranks=contender.virtual_ranks)
    gradients = GradientOptions(shard_optimizer=None if contender.name == "sync" else False)
    # A small rate: models that have learnt their one mini-batch by heart compute with slow denormal numbers.
    optimizer = OptimizerOptions(lr=1e-4, momentum=0.9)
    return build_strategy(options, gradients, optimizer, workload.build(), comm)


def _whole_batch(workload: Workload, ranks: int) -> tuple[Tensor, Tensor]:
    inputs, labels = zip(*(workload.batch(rank) for rank in range(ranks)), strict=True)
    return torch.cat(inputs), torch.cat(labels)


def _share(batch: tuple[Tensor, Tensor], comm: Communicator, contender: _Contender) -> Share:
    """Return this rank's share of the mini-batch, in shards where there are virtual ranks."""
    total, parts = len(batch[0]), contender.virtual_ranks or comm.size

    def loss_of(piece: slice) -> Callable[[nn.Module], Tensor]:
        inputs, labels = batch[0][piece], batch[1][piece]
        return lambda model: functional.cross_entropy(model(inputs), labels)

    each = parts // comm.size
    pieces = [share(total, part, parts) for part in range(comm.rank * each, (comm.rank + 1) * each)]
    own = [Share([loss_of(one)], one.stop - one.start, total) for one in pieces]
    if contender.virtual_ranks is None:
        return own[0]
    return Share([], sum(one.samples for one in own), total, shards=own)


def _wrong(workload: Workload, batch: tuple[Tensor, Tensor], comm: Communicator, contender: _Contender) -> bool:
    def trained(over: Communicator) -> str:
        strategy, own = _strategy(workload, over, contender), _share(batch, over, contender)
        for _ in range(_CHECKED_STEPS):
            strategy.step(own)
        strategy.finish()
        return parameters_sha256(strategy.model)

    digests = all_gather_object(comm, trained(comm))
    if contender.virtual_ranks is not None:
        digests.append(all_gather_object(comm, trained(SingleCommunicator()) if comm.rank == 0 else "")[0])
    return len(set(digests)) > 1


def _round(strategy: Strategy, own: Share, comm: Communicator, steps: int) -> float:
    """Return the seconds per step of the slowest rank."""
    comm.barrier().wait()
    started = time.perf_counter()
    for _ in range(steps):
        strategy.step(own)
    seconds = torch.tensor([(time.perf_counter() - started) / steps], dtype=torch.float64)
    return float(comm.all_reduce(seconds, ReduceOp.MAX).wait())


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("virtual_ranks", "Measure steps with virtual ranks against plain synchronous ones.")
    add = parser.add_argument
    add("--workloads", default="mlp512-b64,cnn-b64", metavar="NAMES", help=f"of {', '.join(WORKLOADS)}")
    add("--multiples", type=positive_ints, default="1,2,4", metavar="N,...", help="virtual ranks per rank")
    add("--steps", type=positive_int, default=20, metavar="N", help="steps a round")
    add("--rounds", type=positive_int, default=9, metavar="N", help="rounds, of which the median counts")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    options.workloads = names("--workloads", options.workloads, tuple(WORKLOADS))
    fewest = min(WORKLOADS[name].batch_size for name in options.workloads)
    if max(options.multiples) > fewest:
        raise ConfigError(f"--multiples {max(options.multiples)}: choose at most {fewest}, the samples of a rank")
    check_writable("--json", options.json)
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
