"""Runs the tests of tests/mpi on 1, 2, 3 and 4 ranks, each rank one pytest."""

import re

import pytest

from tests.launching import mpirun


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.timeout(1300)
def test_all_of_tests_mpi(ranks: int) -> None:
    done = mpirun(
        ranks,
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/mpi"],
        timeout_seconds=1200,
        environment={"ALLREDUCE_SGD_UNDER_MPIRUN": "1"},
    )
    # Without the dots of all ranks, which would hide what failed.
    told = [line for line in done.output.splitlines() if not re.fullmatch(r"[.sxFE]*(\s*\[ *\d+%\])?", line)]
    print("\n".join(told))
    assert done.status == 0
    assert done.output.count(" passed") == ranks
