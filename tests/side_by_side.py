"""Which tests may run at the same time: `pytest -n 2 --dist loadfile --no-loadscope-reorder`.

Files do, each test of test_under_mpirun.py too, since it is a whole set of tests, and those of `ONE_AT_A_TIME` go one
after another beside the others.
"""

from pathlib import PurePosixPath

import pytest
from xdist.scheduler.loadfile import LoadFileScheduling

__all__ = ["Scheduling", "longest_first"]

# They kill ranks, and look at what is left on the machine or at how long something took.
ONE_AT_A_TIME = frozenset(
    "faults launch test_failure test_preemption test_resume test_server_failure test_shared_memory_kill "
    "test_warm_start".split()
)
_SETS_OF_TESTS = "test_under_mpirun"
_ONE_AT_A_TIME = "one at a time"


def unit(nodeid: str) -> str:
    """Return the name of what runs on one worker, one test after another."""
    file = PurePosixPath(nodeid.split("::")[0])
    name = file.relative_to("tests").with_suffix("").parts[0]
    if name in ONE_AT_A_TIME:
        return _ONE_AT_A_TIME
    return nodeid if name == _SETS_OF_TESTS else str(file)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests, in place, so that no worker is left at the end with what takes long."""
    items.sort(key=lambda item: (unit(item.nodeid) != _ONE_AT_A_TIME, _SETS_OF_TESTS not in item.nodeid))


class Scheduling(LoadFileScheduling):
    """Gives units to workers."""

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)
