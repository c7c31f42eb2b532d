"""Runs the tests of tests/mpi on 4, 3, 2 and 1 ranks, the longest first, each rank one pytest."""

import re

import pytest

from tests.launching import mpirun


@pytest.mark.parametrize("ranks", [4, 3, 2, 1])
@pytest.mark.timeout(1700)
def test_all_of_tests_mpi(ranks: int) -> None:
    done = mpirun(
        ranks,
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/mpi"],
        timeout_seconds=1600,
        environment={"ALLREDUCE_SGD_UNDER_MPIRUN": "1"},
    )
    # Without the dots of all ranks, which would hide what failed.
    told = [line for line in done.output.splitlines() if not re.fullmatch(r"[.sxFE]*(\s*\[ *\d+%\])?", line)]
    # What failed is on standard error (tests/mpi/conftest.py).
    assert done.status == 0, "\n".join([*told, done.errors])
    assert done.output.count(" passed") == ranks, "\n".join(told)
