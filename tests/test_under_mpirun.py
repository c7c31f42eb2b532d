"""Runs the tests of tests/mpi on 4, 3, 2 and 1 ranks, the longest first, each rank one pytest.

On 3 ranks collectives and strategies, whose parts an odd number cuts otherwise; the rest knows one rank or several.
"""

import re

import pytest

from tests.launching import ROOT, mpirun

NOT_ON_3 = "anchored_state check_sync ddp_* horovod mismatch noise_scale optimizers sharded_state strategy_precision "
NOT_ON_3 += "sync_batch_norm theory trace"


@pytest.mark.parametrize("ranks", [4, 3, 2, 1])
@pytest.mark.timeout(1700)
def test_all_of_tests_mpi(ranks: int) -> None:
    patterns = NOT_ON_3.split() if ranks == 3 else []
    left_out = [f"--ignore-glob={ROOT}/tests/mpi/test_{pattern}.py" for pattern in patterns]
    done = mpirun(
        ranks,
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *left_out, "tests/mpi"],
        timeout_seconds=1600,
        environment={"ALLREDUCE_SGD_UNDER_MPIRUN": "1"},
    )
    # Without the dots of all ranks, which would hide what failed.
    told = [line for line in done.output.splitlines() if not re.fullmatch(r"[.sxFE]*(\s*\[ *\d+%\])?", line)]
    print("\n".join(told))
    assert done.status == 0
    assert done.output.count(" passed") == ranks
