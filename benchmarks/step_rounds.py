"""Contenders take turns within rounds, in an order that rotates; the first step of every turn is checked."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.topology import Topology
from benchmarks.contenders import Contender, Reference, Turn, reference
from benchmarks.step_contenders import ALONE
from benchmarks.workloads import Workload

__all__ = ["Rounds", "Schedule", "measure_rounds"]

Rounds = Mapping[tuple[str, str], Sequence[Sequence[Turn]]]
"""By contender's name and setting: the turns of every round, in the order of ranks."""


@dataclass(frozen=True)
class Schedule:
    """How many rounds, and how many untimed and timed steps in every turn."""

    rounds: int
    warmup: int
    steps: int


@dataclass(frozen=True)
class _Report:
    """What a rank has to say after a turn: its times, what is wrong, and a hash of the parameters it checked."""

    turn: Turn | None = None
    wrong: str | None = None
    parameters_sha256: str | None = None


def measure_rounds(
    name: str,
    workload: Workload,
    field: Sequence[Contender],
    topology: Topology,
    comm: Communicator,
    schedule: Schedule,
    after_round: Callable[[], None],
) -> Rounds:
    """Let all contenders of a workload take their turns; `after_round` is called at the end of every round.

    All ranks must call. Raises RuntimeError where a step was wrong on any rank.
    """
    truth = reference(workload, topology.size)
    batch = workload.batch(topology.rank)
    rounds: dict[tuple[str, str], list[list[Turn]]] = {(each.name, each.setting): [] for each in field}
    silent = topology.rank > 0 or not sys.stderr.isatty()
    with tqdm(total=schedule.rounds * len(field), desc=name, unit="turn", leave=False, disable=silent) as bar:
        for index in range(schedule.rounds):
            first = index % len(field)
            for each in [*field[first:], *field[:first]]:
                comm.barrier().wait()
                mine = _Report()
                if topology.rank == 0 or each.name != ALONE:
                    mine = _take_turn(each, truth, batch, schedule)
                # Ranks without a part in this turn sleep in here, polling some hundred times a second.
                rounds[each.name, each.setting].append(_agreed(f"{name}, {each.label}", topology.gather_all(mine)))
                bar.update()
            after_round()
    return rounds


def _take_turn(contender: Contender, truth: Reference, batch: tuple[Tensor, Tensor], schedule: Schedule) -> _Report:
    contender.reset()
    wrong = digest = None
    if contender.synchronises:
        contender.step(batch)
        wrong, digest = contender.check(truth), parameters_sha256(contender.module)
    contender.turn(batch, schedule.warmup)
    return _Report(contender.turn(batch, schedule.steps), wrong, digest)


def _agreed(what: str, reports: Sequence[_Report]) -> list[Turn]:
    """Return the turns of those ranks that had one, or raise RuntimeError where a step was wrong on any rank."""
    for rank, report in enumerate(reports):
        if report.wrong is not None:
            raise RuntimeError(f"{what}: after one step rank {rank} differs from a serial step: {report.wrong}")
    if len({report.parameters_sha256 for report in reports}) > 1:
        raise RuntimeError(f"{what}: after one step the parameters are not the same bits on all ranks")
    return [report.turn for report in reports if report.turn is not None]
