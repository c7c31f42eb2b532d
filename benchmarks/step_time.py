"""What does communication cost a training step? `mpirun -np N python -m benchmarks.step_time`.

Contenders (all in one run, one after another in every round, in an order that rotates, so that the drift of a noisy
machine hits all alike):

- alone             rank 0 computes, the other ranks sleep: what one core does with the machine to itself
- no_communication  all ranks compute at once and exchange nothing: alone, plus contention for memory and power
- allreduce_sgd     our DistributedDataParallel over the mpi back end
- torch_ddp_gloo    torch's DistributedDataParallel over Gloo, the fastest of its settings in this run

All compute in one thread per rank. In round r the time of a contender is the mean over its steps, and the maximum over
ranks; t = the median over rounds. `ratio` is the median over rounds of (its time in round r / that of
no_communication in round r): 1 means that communication is free. Exposed communication of ours is the time that the
training thread waits, and its backward leaves that out; torch's DDP does not tell, so that its backward contains it,
and what is called exposed is the median over rounds of (its time - that of no_communication).

Every round starts with one step whose gradients and parameters are checked against a serial step with the mini-batches
of all ranks, and whose outcome must be the same bits on all ranks; a wrong one ends the benchmark with status 1.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.topology import Topology, discover, launcher_rank
from benchmarks.arguments import Parser, check_writable, names, positive_int
from benchmarks.contenders import Contender, Reference, Turn, contenders, reference
from benchmarks.record import write_record
from benchmarks.table import format_number, format_table
from benchmarks.workloads import WORKLOADS

__all__ = ["Rounds", "main", "summarise"]

Rounds = Mapping[tuple[str, str], Sequence[Sequence[Turn]]]
"""By contender's name and setting: the turns of every round, in the order of ranks."""

_BASELINE = ("no_communication", "")
_ALONE = "alone"


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
        topology.agree(lambda: check_writable("--json", options.json) if topology.rank == 0 else None)
        rows = _measure_all(topology, options)
    except ConfigError as problem:
        if problem.rank in (None, topology.rank):
            _complain(problem)
        return 2
    if topology.rank == 0:
        print(_table(rows))
        if options.json is not None:
            write_record(options.json, "step_time", arguments, rows)
    return 0


def summarise(workload: str, ranks: int, rounds: Rounds) -> list[dict[str, Any]]:
    """Return a row for each contender: of the settings of one, only the fastest."""
    baseline = _slowest(rounds[_BASELINE])
    fastest: dict[str, str] = {}
    tried: dict[str, dict[str, float]] = {}
    for (name, setting), turns in rounds.items():
        tried.setdefault(name, {})[setting] = statistics.median(_slowest(turns))
        fastest[name] = min(tried[name], key=tried[name].__getitem__)
    rows = []
    for name, setting in fastest.items():
        turns = rounds[name, setting]
        slowest = _slowest(turns)
        waited_seconds = _typical(turns, lambda turn: turn.exposed_seconds)
        longer_seconds = statistics.median(mine - base for mine, base in zip(slowest, baseline, strict=True))
        rows.append(
            {
                "workload": workload,
                "contender": name,
                "setting": setting,
                "ranks": ranks,
                "rounds": len(turns),
                "median_seconds": tried[name][setting],
                "minimum_seconds": min(slowest),
                "maximum_seconds": max(slowest),
                "ratio": statistics.median(mine / base for mine, base in zip(slowest, baseline, strict=True)),
                "forward_seconds": _typical(turns, lambda turn: turn.forward_seconds),
                "backward_seconds": _typical(turns, lambda turn: turn.backward_seconds),
                "optimizer_seconds": _typical(turns, lambda turn: turn.optimizer_seconds),
                "exposed_seconds": longer_seconds if waited_seconds is None else waited_seconds,
                "exposed_by": "difference" if waited_seconds is None else "waiting",
                "sent_bytes": _typical(turns, lambda turn: turn.sent_bytes),
                "settings_tried": {each: seconds for each, seconds in tried[name].items() if each},
            }
        )
    return rows


def _slowest(rounds: Sequence[Sequence[Turn]]) -> list[float]:
    """Return the seconds per step of each round: the maximum over ranks."""
    return [max(turn.seconds for turn in turns) for turns in rounds]


def _typical(rounds: Sequence[Sequence[Turn]], part: Callable[[Turn], float | None]) -> float | None:
    """Return the mean over ranks in each round, then the median over rounds; None where it was not measured.

    The mean, not the maximum: the ranks of a step end together, and what one waits the other computes.
    """
    means = []
    for turns in rounds:
        values = [value for value in map(part, turns) if value is not None]
        if values:
            means.append(statistics.fmean(values))
    return statistics.median(means) if means else None


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("step_time", "Measure what communication costs a training step; start it with mpirun -np N.")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), metavar="NAMES", help="separated by commas")
    parser.add_argument("--steps", type=positive_int, default=30, metavar="N", help="timed steps per round")
    parser.add_argument("--warmup", type=positive_int, default=5, metavar="N", help="untimed steps before them")
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="turns of each contender")
    parser.add_argument("--timeout-seconds", type=positive_int, default=300, metavar="N", help="deadline of every wait")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    options.workloads = names("--workloads", options.workloads, tuple(WORKLOADS))
    return options


def _complain(problem: ConfigError) -> None:
    print(f"step_time: error: {problem}", file=sys.stderr, flush=True)


def _measure_all(topology: Topology, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    backend = "mpi" if topology.size > 1 else "single"
    ours = connect(topology, device, CommunicationOptions(backend, timeout_seconds=options.timeout_seconds))
    # This makes torch's default process group, which torch's DDP takes.
    gloo = connect(topology, device, CommunicationOptions("gloo", timeout_seconds=options.timeout_seconds))
    rows = []
    for name in options.workloads:
        rows += summarise(name, topology.size, _measure(name, topology, ours, options))
    gloo.close()
    ours.close()
    return rows


def _measure(name: str, topology: Topology, comm: Communicator, options: argparse.Namespace) -> Rounds:
    workload = WORKLOADS[name]
    field = list(contenders(workload, comm))
    truth = reference(workload, topology.size)
    batch = workload.batch(topology.rank)
    rounds: dict[tuple[str, str], list[list[Turn]]] = {(each.name, each.setting): [] for each in field}
    silent = topology.rank > 0 or not sys.stderr.isatty()
    with tqdm(total=options.rounds * len(field), desc=name, unit="turn", leave=False, disable=silent) as bar:
        for index in range(options.rounds):
            first = index % len(field)
            for each in field[first:] + field[:first]:
                comm.barrier().wait()
                mine = _Report()
                if topology.rank == 0 or each.name != _ALONE:
                    mine = _take_turn(each, truth, batch, options)
                # Ranks without a part in this turn sleep in here, polling a hundred times a second.
                rounds[each.name, each.setting].append(_agreed(f"{name}, {each.label}", topology.gather_all(mine)))
                bar.update()
    return rounds


@dataclass(frozen=True)
class _Report:
    """What a rank has to say after a turn: its times, what is wrong, and a hash of the parameters it checked."""

    turn: Turn | None = None
    wrong: str | None = None
    parameters_sha256: str | None = None


def _take_turn(
    contender: Contender, truth: Reference, batch: tuple[Tensor, Tensor], options: argparse.Namespace
) -> _Report:
    contender.reset()
    wrong = digest = None
    if contender.synchronises:
        contender.turn(batch, 1)
        wrong, digest = contender.check(truth), parameters_sha256(contender.module)
    contender.turn(batch, options.warmup)
    return _Report(contender.turn(batch, options.steps), wrong, digest)


def _agreed(what: str, reports: Sequence[_Report]) -> list[Turn]:
    """Return the turns of those ranks that had one, or raise RuntimeError where a step was wrong on any rank."""
    for rank, report in enumerate(reports):
        if report.wrong is not None:
            raise RuntimeError(f"{what}: after one step rank {rank} differs from a serial step: {report.wrong}")
    if len({report.parameters_sha256 for report in reports}) > 1:
        raise RuntimeError(f"{what}: after one step the parameters are not the same bits on all ranks")
    return [report.turn for report in reports if report.turn is not None]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["workload", "contender", "ms per step", "ratio", "forward", "backward", "optimizer", "exposed", "MB sent"]
    lines = []
    for row in rows:
        low, middle, high = (1e3 * row[f"{which}_seconds"] for which in ("minimum", "median", "maximum"))
        phases = [1e3 * row[f"{phase}_seconds"] for phase in ("forward", "backward", "optimizer", "exposed")]
        sent = None if row["sent_bytes"] is None else row["sent_bytes"] / 1e6
        lines.append(
            [
                row["workload"],
                f"{row['contender']} {row['setting']}".rstrip(),
                f"{format_number(middle)} [{format_number(low)}–{format_number(high)}]",
                f"{row['ratio']:.3f}",
                *map(format_number, phases),
                format_number(sent),
            ]
        )
    ranks = rows[0]["ranks"]
    heading = f"{ranks} rank{'s' if ranks > 1 else ''}, one thread each; milliseconds per step"
    return f"{heading}\n\n{format_table(header, lines, 2)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
