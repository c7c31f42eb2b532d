"""One run of a study: trained in a folder of its own, unless it stands there already, and read from its files.

The folder appears under its final name only when the run has ended well, so that a study that was killed goes on where
it stopped; what an interrupted run left behind is dropped.
"""

import json
import shutil
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError
from benchmarks.runs import check_same, train
from benchmarks.study.cells import TORCH, flags_of, folder_name
from benchmarks.study.results import Cell, Evaluation, Phase, Run
from benchmarks.study.spec import Spec

__all__ = ["RUNS", "check_finished", "is_finished", "read_run", "run_cell"]

RUNS = "runs"
"""The folder of the runs within that of the study."""
_PROVENANCE = "provenance.json"


def is_finished(output: Path, cell: Cell, lr: float, seed: int) -> bool:
    """Say whether the run stands in the study's folder."""
    return (output / RUNS / folder_name(cell, lr, seed)).exists()


def check_finished(spec: Spec, output: Path, cell: Cell, lr: float, seed: int) -> None:
    """Raise ConfigError where the run stands there, but was made with other flags."""
    if is_finished(output, cell, lr, seed):
        check_same(output / RUNS / folder_name(cell, lr, seed), flags_of(spec, cell, lr, seed))


def run_cell(
    spec: Spec,
    output: Path,
    data_dir: Path | None,
    cell: Cell,
    phase: Phase,
    lr: float,
    seed: int,
    provenance: Mapping[str, Any],
) -> Run:
    """Train, unless a finished run is there, which `check_finished` has looked at. Raises RunFailed, and ConfigError
    where the run refuses its flags.

    `provenance`, what trains now and where, is kept beside a run that is made.
    """
    name = f"{RUNS}/{folder_name(cell, lr, seed)}"
    flags = flags_of(spec, cell, lr, seed)
    folder = output / name
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        places = {"output": str(unfinished), **({} if data_dir is None else {"data-dir": str(data_dir)})}
        program = "benchmarks.study.torch_ddp" if cell.contender == TORCH else "allreduce_sgd.train"
        rate = None if cell.network == "none" else cell.network
        train(cell.ranks, {**flags, **places}, spec.timeout_seconds, program, rate)
        # Nobody goes on from them, and those of hundreds of runs fill a disk.
        shutil.rmtree(unfinished / "checkpoints", ignore_errors=True)
        (unfinished / _PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    return read_run(output, name, cell, phase, lr, seed, spec.target_accuracy)


def read_run(output: Path, name: str, cell: Cell, phase: Phase, lr: float, seed: int, target_accuracy: float) -> Run:
    """Read what the run in the folder `name` of `output` took to reach the target."""
    summary = json.loads((output / name / "summary.json").read_text(encoding="utf-8"))
    evaluations = _evaluations(output / name)
    hit = next((each for each in evaluations if each.test_accuracy >= target_accuracy), None)
    sent: float | None = summary["communication_bytes"]
    return Run(
        cell=cell,
        phase=phase,
        lr=lr,
        seed=seed,
        reached=hit is not None,
        seconds=inf if hit is None else hit.train_seconds,
        wall_seconds=inf if hit is None else hit.wall_seconds,
        samples=inf if hit is None else hit.samples,
        steps=inf if hit is None else hit.steps,
        # The run stops at the target, so what it sent in all is what it sent to get there.
        bytes=inf if hit is None and sent is not None else sent,
        samples_per_second=summary["samples_per_second"],
        communication_seconds=summary["communication_seconds"],
        exposed_communication_seconds=summary["exposed_communication_seconds"],
        train_seconds=summary["train_seconds"],
        noise_scale=summary.get("noise_scale"),
        folder=name,
        evaluations=evaluations,
        commit=_commit(output / name),
    )


def _commit(folder: Path) -> str | None:
    try:
        commit: str | None = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))["commit"]
    except FileNotFoundError:
        return None
    return commit


def _evaluations(folder: Path) -> tuple[Evaluation, ...]:
    found = []
    sent: float | None = None
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == "train":
            sent = entry["communication_bytes"]
        elif entry["event"] == "evaluation":
            if entry["test_accuracy"] is None:
                raise ConfigError(f"dataset: a run on it ({folder}) has no test accuracy to reach")
            found.append(
                Evaluation(
                    entry["step"],
                    entry["samples"],
                    entry["train_seconds"],
                    entry["wall_seconds"],
                    sent,
                    entry["test_accuracy"],
                    entry["test_loss"],
                )
            )
    return tuple(found)
