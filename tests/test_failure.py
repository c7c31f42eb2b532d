"""When one rank fails all end within seconds, with the cause named once, and nothing is left running."""

import time
import uuid
from pathlib import Path

import pytest

from tests.faults.jobs import assert_nothing_left
from tests.launching import mpirun
from tests.shared_memory_files import abandoned_in_shm

TRAIN = ["-m", "allreduce_sgd.train", "--batch-size", "8"]


def run_failing(model: str, folder: Path, *flags: str, ranks: int = 3) -> tuple[int, str, float]:
    name, before = str(uuid.uuid4()), abandoned_in_shm()
    failure_time = folder / "failure_time"
    done = mpirun(
        ranks,
        [*TRAIN, "--model", f"tests.parts:{model}", "--output", str(folder / "run"), *flags],
        environment={"TEST_FAILURE_TIME": str(failure_time), "FAULT_TEST": name},
    )
    if failure_time.exists():
        # A rank that waited for its deadline would take 300 s.
        assert time.time() - float(failure_time.read_text()) < 30
    assert_nothing_left(name, before)
    return done.status, done.errors, done.seconds


def test_an_exception_on_one_rank_ends_all_and_is_told_once(tmp_path: Path) -> None:
    status, errors, seconds = run_failing("fails_on_rank_1", tmp_path)
    assert status not in (0, 2)
    assert errors.count("rank 1 of 3 on ") == 1
    assert ": ArithmeticError: the third step went wrong" in errors
    assert errors.count("Traceback") == 1
    assert "in _fail" in errors
    # Starting takes most of it; a rank that waited for its deadline would take 300 s.
    assert seconds < 60


def test_an_exception_on_all_ranks_is_told_once(tmp_path: Path) -> None:
    status, errors, _ = run_failing("fails_everywhere", tmp_path)
    assert status not in (0, 2)
    assert errors.count("ArithmeticError: the third step went wrong") == 2, (
        "once in the headline, once in the traceback"
    )
    assert errors.count("rank 0 of 3 on ") == 1
    assert errors.count("Traceback") == 1


def test_an_exception_in_another_thread_ends_all(tmp_path: Path) -> None:
    status, errors, _ = run_failing("fails_in_thread_of_rank_1", tmp_path)
    assert status not in (0, 2)
    assert errors.count("rank 1 of 3 on ") == 1
    assert "thread reader: ArithmeticError" in errors
    assert errors.count("Traceback") == 1


def test_a_parameter_without_gradient_is_named(tmp_path: Path) -> None:
    status, errors, _ = run_failing("forgetful_model", tmp_path, "--no-find-unused-parameters")
    assert status not in (0, 2)
    assert "1 of 3 parameters got no gradient in this backward pass: forgotten" in errors
    assert errors.count("Traceback") == 1


@pytest.mark.parametrize("backend", ["mpi", "gloo"])
def test_a_silent_rank_ends_the_job_at_the_deadline(tmp_path: Path, backend: str) -> None:
    flags = ["--timeout-seconds", "3", "--backend", backend]
    status, errors, seconds = run_failing("silent_rank", tmp_path, *flags, ranks=2)
    assert status not in (0, 2)
    # 650 gradients and a flag per parameter, or, where the optimizer is sharded, chunks of whole cache lines.
    operation = "reduce_scatter of 768" if backend == "mpi" else "all_reduce of 653"
    assert f"CommunicationTimeout: step 3: bucket 1 of 1: {operation} float32" in errors
    # Over MPI the ranks know of each other what they are in.
    why = "rank 1 has not started it: its last was" if backend == "mpi" else "a rank is stuck, gone or late"
    assert f"not finished after 3 s; {why}" in errors
    assert seconds < 50
