"""Real trainings under a real SLURM that are warned, stopped, requeued and resumed; array jobs and studies."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.launch.requirements import open_mpi
from tests.launch.slurm_cluster import SlurmCluster
from tests.launch.test_slurm_training import BIN, ROOT, environment
from tests.sweep import stand_in

SCRIPTS = {name: str(ROOT / f"slurm/{name}.sbatch") for name in ("one_node", "sweep", "search", "study")}
TRAINING = ["--model", "tests.launch.interrupted:model", "--global-batch-size", "32"]
STEPS = {"limit": 700, "term": 60}
# On one rank as on two.
SAME_SUMS = "--momentum 0 --virtual-ranks 2"
SLOW = {"TEST_STEP_SECONDS": "0.1"}
SPEC = """\
name = "small"
dataset = "digits"
model = "mlp"
hidden = "32"
target_accuracy = 0.5
epochs = 2
seeds = 1
evaluate_every_samples = 256
timeout_seconds = 200
[tuning]
lr = [0.05]
[grid]
ranks = [2]
strategies = ["sync"]
global_batch_sizes = [64]
[baselines]
serial_batches = [64]
"""

pytestmark = [
    # Jobs wait for one another.
    pytest.mark.timeout(600),
    pytest.mark.slurm,
    pytest.mark.root,
    pytest.mark.skipif(not (BIN / "mpirun").exists(), reason="the environment brings no mpirun (pip install mpich)"),
]


class Jobs(NamedTuple):
    """What was submitted together: the one waits for its time limit while others run on the other node."""

    folder: Path
    limited: int
    sweep: int


@pytest.fixture(scope="module")
def jobs(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = tmp_path_factory.mktemp("jobs")
    # SLURM looks every 30 s whose limit comes within these 10 s and the next 30.
    limit = ["--nodelist=n2", "--time=1", "--signal=B:USR1@10", SCRIPTS["one_node"]]
    # Which is of no use to the resumed run, that has its own.
    (folder / "training.toml").write_text(f"steps = {STEPS['limit']}\n")
    arguments = [*limit, *TRAINING, "--config", "training.toml"]
    limited = slurm.submit(arguments, folder=folder, environment={**environment("mpirun"), **SLOW})
    flags = folder / "flags.txt"
    flags.write_text(
        f"# undisturbed\n--steps {STEPS['limit']} --log-every '10'\n\n  --steps {STEPS['term']} {SAME_SUMS}\n"
    )
    arguments = ["--nodelist=n1", "--array=1-2", SCRIPTS["sweep"], str(flags), *TRAINING]
    sweep = slurm.submit(arguments, folder=folder, environment=environment("pmi2"))
    return Jobs(folder, limited, sweep)


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def has_step_2(metrics: Path) -> Callable[[str], bool]:
    return lambda _: metrics.exists() and '"step": 2,' in metrics.read_text()


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_task_of_a_sweep_trains_with_its_line_in_its_folder(slurm: SlurmCluster, jobs: Jobs) -> None:
    for task, steps in ((1, STEPS["limit"]), (2, STEPS["term"])):
        job = slurm.wait(f"{jobs.sweep}_{task}", jobs.folder)
        assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
        summary = summary_of(jobs.folder / f"runs/sweep-{jobs.sweep}/task-{task}")
        assert (summary["world_size"], summary["steps"]) == (2, steps)


def test_what_a_sweep_cannot_do_is_told_in_a_line(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"configs/{name}.toml").write_text("steps = 1\n")
    arguments = ["--array=3", "--nodelist=n1", SCRIPTS["sweep"], "configs"]
    number = slurm.submit(arguments, folder=tmp_path, environment=environment("pmi2"))
    job = slurm.wait(f"{number}_3", tmp_path)
    assert (job.state, job.exit_status) == ("FAILED", 2)
    assert job.output.endswith("--array: there is no task 3; configs has 2, from 1 on\n")
    assert len(job.output.splitlines()) == 1
    (tmp_path / "flags.txt").write_text("--steps 1\n--steps 1 --lr '0.1\n")
    number = slurm.submit(
        ["--array=2", "--nodelist=n1", SCRIPTS["sweep"], "flags.txt"], folder=tmp_path, environment=environment("pmi2")
    )
    job = slurm.wait(f"{number}_2", tmp_path)
    assert (job.state, job.exit_status) == ("FAILED", 2)
    assert job.output.endswith("flags.txt: a quote is not closed in the line of task 2: --steps 1 --lr '0.1\n")


def test_sigterm_stops_within_the_grace_and_another_number_of_ranks_goes_on(slurm: SlurmCluster, jobs: Jobs) -> None:
    training = [*TRAINING, "--momentum", "0", "--log-every", "1"]
    arguments = ["--nodelist=n1", "--no-requeue", SCRIPTS["one_node"], *training, "--steps", str(STEPS["term"])]
    number = slurm.submit(arguments, folder=jobs.folder, environment={**environment("pmi2"), **SLOW})
    run = jobs.folder / f"runs/slurm-{number}"
    wait_until(lambda: (run / "metrics.jsonl").exists() and '"step": 3,' in (run / "metrics.jsonl").read_text())
    # As scancel and pre-emption do, to the ranks that srun started.
    slurm.command("scancel", "--signal=TERM", str(number))
    job = slurm.wait(number, jobs.folder)
    assert (job.state, job.exit_status) == ("FAILED", 75), job.output
    assert f"go on with --resume runs/slurm-{number}" in job.output
    resumed = ["--nodelist=n1", "--ntasks-per-node=1", SCRIPTS["one_node"], "--resume", str(run)]
    job = slurm.run(resumed, folder=jobs.folder, environment=environment("pmi2"))
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    slurm.wait(f"{jobs.sweep}_2", jobs.folder)
    summary, whole = summary_of(run), summary_of(jobs.folder / f"runs/sweep-{jobs.sweep}/task-2")
    assert (summary["world_size"], summary["global_batch_size"]) == (1, 32)
    for key in ("steps", "samples", "epochs"):
        assert summary[key] == whole[key]


def test_a_job_that_somebody_cancels_is_not_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    arguments = ["--nodelist=n1", SCRIPTS["one_node"], *TRAINING, "--log-every", "1", "--steps", "500"]
    number = slurm.submit(arguments, folder=tmp_path, environment={**environment("pmi2"), **SLOW})
    run = tmp_path / f"runs/slurm-{number}"
    wait_until(lambda: (run / "metrics.jsonl").exists())
    slurm.command("scancel", str(number))
    # A job that was requeued would be pending, and train to its end.
    job = slurm.wait(number, tmp_path)
    assert job.state == "CANCELLED", job.output
    # What it had learnt is not lost.
    assert f"go on with --resume runs/slurm-{number}" in job.output


def test_a_study_that_was_stopped_goes_on_with_the_run_it_was_in(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SPEC)
    arguments = ["--nodelist=n1", SCRIPTS["study"], "small.toml", "--json", "record.json"]
    settings = {**environment(""), "PYTHON": sys.executable}
    number = slurm.submit(arguments, folder=tmp_path, environment=settings)
    results = tmp_path / "runs/study-small/results.jsonl"
    # A line of what is studied, then one for each finished run.
    wait_until(lambda: results.exists() and len(results.read_text().splitlines()) >= 2)
    slurm.command("scancel", "--batch", "--signal=USR1", str(number))
    first = next((tmp_path / "runs/study-small/runs").glob("*[!d]/summary.json"))
    written = first.stat().st_mtime_ns
    job = slurm.wait(number, tmp_path)
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    assert job.output.count("1 node(s): ") == 2
    assert first.stat().st_mtime_ns == written
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert sorted(row["ranks"] for row in rows) == [1, 2]
    assert all(row["reached"] for row in rows)


def test_a_search_that_was_stopped_goes_on_with_its_trials(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(f'method = "grid"\n[parameters]\nlr = [{stand_in.WAITS}, {stand_in.ENDS}]\n')
    python = tmp_path / "python"
    trial = f"{sys.executable} -I -S {stand_in.__file__}"
    python.write_text(f'#!/bin/sh\n[ "$2" = allreduce_sgd.sweep ] || exec {trial} "$@"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    arguments = ["--nodelist=n1", SCRIPTS["search"], "spec.toml", "--ranks", "4", "--ranks-per-trial", "2"]
    number = slurm.submit(arguments, folder=tmp_path, environment={**environment(""), "PYTHON": str(python)})
    output = tmp_path / f"runs/search-{number}"
    wait_until((output / "trials/000/waiting").exists)
    slurm.command("scancel", "--batch", "--signal=USR1", str(number))
    job = slurm.wait(number, tmp_path)
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    assert job.output.count("1 node(s): ") == 2
    assert f"go on with --resume runs/search-{number}" in job.output
    assert "--resume runs/search-" in (output / "trials/000.log").read_text()
    results = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert {each["trial"]: each["value"] for each in results} == {0: stand_in.WAITS, 1: stand_in.ENDS}


def test_a_job_at_its_time_limit_goes_on_to_the_same_parameters(slurm: SlurmCluster, jobs: Jobs) -> None:
    job = slurm.wait(jobs.limited, jobs.folder)
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    assert f"go on with --resume runs/slurm-{jobs.limited}" in job.output
    assert f"resumed from runs/slurm-{jobs.limited}/checkpoints/step-" in job.output
    slurm.wait(f"{jobs.sweep}_1", jobs.folder)
    summary = summary_of(jobs.folder / f"runs/slurm-{jobs.limited}")
    whole = summary_of(jobs.folder / f"runs/sweep-{jobs.sweep}/task-1")
    assert summary["steps"] == STEPS["limit"]
    assert summary["parameters_sha256"] == whole["parameters_sha256"]


def test_preempted_jobs_make_room_and_go_on_to_the_same_parameters(slurm: SlurmCluster, jobs: Jobs) -> None:
    """Nobody sends a signal here: the job of a partition of higher priority wants both nodes."""
    slurm.wait(jobs.limited, jobs.folder)
    training = [*TRAINING, *SAME_SUMS.split(), "--steps", str(STEPS["term"]), "--log-every", "1"]
    launches = [("n1", 2, BIN, "pmi2"), ("n2", 1, BIN, "mpirun"), ("n2", 1, open_mpi(), "mpirun")]
    numbers = [
        slurm.submit(
            [
                f"--nodelist={node}",
                f"--ntasks-per-node={ranks}",
                SCRIPTS["one_node"],
                *training,
                "--checkpoint-every",
                "2",
            ],
            folder=jobs.folder,
            # Slow enough for one that has started not to end before the others start.
            environment={**environment(launch), "MPIRUN": str(programs / "mpirun"), "TEST_STEP_SECONDS": "1"},
        )
        for node, ranks, programs, launch in launches
    ]
    for number in numbers:
        metrics = jobs.folder / f"runs/slurm-{number}/metrics.jsonl"
        slurm.watch(number, jobs.folder, has_step_2(metrics))
    urgent = slurm.run(
        ["--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--wrap=hostname"], folder=jobs.folder
    )
    assert urgent.state == "COMPLETED"
    slurm.wait(f"{jobs.sweep}_2", jobs.folder)
    whole = summary_of(jobs.folder / f"runs/sweep-{jobs.sweep}/task-2")
    for number, (_, _, programs, _) in zip(numbers, launches, strict=True):
        job = slurm.wait(number, jobs.folder)
        assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
        # Of TERM Open MPI's mpirun ends its ranks: its job goes on from an earlier checkpoint.
        assert job.output.count(f"go on with --resume runs/slurm-{number}\n") == (programs == BIN), job.output
        assert f"resumed from runs/slurm-{number}/checkpoints/step-" in job.output
        summary = summary_of(jobs.folder / f"runs/slurm-{number}")
        assert summary["steps"] == whole["steps"]
        assert summary["parameters_sha256"] == whole["parameters_sha256"], job.output
