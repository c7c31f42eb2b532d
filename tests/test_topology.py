"""What the launchers' variables mean, which device and how many threads a rank takes."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.topology import Topology, announced_size, discover, launcher_rank, remove_abandoned


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ("Open MPI", 4)),
        ({"PMI_SIZE": "2"}, ("MPICH", 2)),
        ({"SLURM_STEP_NUM_TASKS": "3"}, ("SLURM", 3)),
        # mpirun inside one SLURM step: its own word counts.
        ({"PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, ("MPICH", 2)),
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, ("MPICH", 1)),
        # One launcher inside another: a run of one rank that was started rightly is never refused.
        ({"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "4"}, ("MPICH", 1)),
        # A batch script of a job with several tasks, with no launcher at work.
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, None),
        ({"PMI_SIZE": "many"}, None),
    ],
)
def test_announced_size_is_the_innermost_launchers(environment: dict[str, str], expected: Any) -> None:
    assert announced_size(environment) == expected


def test_launcher_rank_is_the_launchers_own() -> None:
    assert launcher_rank({}) == 0
    assert launcher_rank({"PMI_SIZE": "2", "PMI_RANK": "1", "SLURM_PROCID": "0"}) == 1
    assert launcher_rank({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}) == 3
    assert launcher_rank({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}) == 2
    assert launcher_rank({"SLURM_PROCID": "2"}) == 0


def test_without_a_launcher_one_rank_runs_without_mpi() -> None:
    topology = discover(environment={})
    assert (topology.rank, topology.size, topology.world) == (0, 1, None)
    assert topology.agree(lambda: 3) == 3
    assert topology.broadcast("x") == "x"
    with pytest.raises(ConfigError, match="because"):
        topology.agree(lambda: (_ for _ in ()).throw(ConfigError("because")))


def fake_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "requested", "expected"),
    [
        (0, 1, "auto", "cpu"),
        (4, 2, "auto", "cuda:2"),
        (4, 2, "cuda", "cuda:2"),
        (1, 3, "auto", "cuda:0"),  # bound by the scheduler, or shared
        (2, 3, "auto", "cuda:1"),
        (4, 2, "cuda:0", "cuda:0"),
        (4, 2, "CPU", "cpu"),
    ],
)
def test_device_of_a_rank(
    monkeypatch: pytest.MonkeyPatch, gpus: int, local_rank: int, requested: str, expected: str
) -> None:
    fake_gpus(monkeypatch, gpus)
    assert Topology(local_rank=local_rank, local_size=4).choose_device(requested) == torch.device(expected)


@pytest.mark.parametrize(
    ("gpus", "requested", "text"),
    [(0, "cuda", "sees 0"), (2, "cuda:5", "sees 2"), (0, "tpu", "choose auto"), (1, "cuda:x", "choose auto")],
)
def test_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, requested: str, text: str
) -> None:
    fake_gpus(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=text) as caught:
        Topology().choose_device(requested)
    assert "--device" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_threads_share_the_cores_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert Topology(cores=16, local_size=4).threads_per_rank() == 4
    assert Topology(cores=2, local_size=4).threads_per_rank() == 1
    # A launcher that binds each rank to one core leaves it one thread.
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    assert Topology(cores=16, local_size=4).threads_per_rank() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Topology(cores=16, local_size=4).threads_per_rank() == 7


def test_files_of_killed_jobs_are_removed_and_those_in_use_are_not(tmp_path: Path) -> None:
    folder, processes = tmp_path / "shm", tmp_path / "proc"
    (processes / "17").mkdir(parents=True)
    folder.mkdir()
    for name in ("mpich_shm_1_0", "sm_segment.host.0.1", "mpich_shm_used_0", "somebody_elses"):
        (folder / name).touch()
    line = f"7f0000000000-7f0000100000 rw-s 00000000 00:1a 5    {folder / 'mpich_shm_used_0'}\n"
    (processes / "17" / "maps").write_text(line)
    assert remove_abandoned(folder, processes, time.time()) == []
    removed = remove_abandoned(folder, processes, time.time() + 61)
    assert {path.name for path in removed} == {"mpich_shm_1_0", "sm_segment.host.0.1"}
    assert {path.name for path in folder.iterdir()} == {"mpich_shm_used_0", "somebody_elses"}


def test_a_machine_without_shared_memory_files_has_nothing_to_remove(tmp_path: Path) -> None:
    assert remove_abandoned(tmp_path / "none", tmp_path, 0.0) == []
