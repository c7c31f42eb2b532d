import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore Ctrl-C, all their children would, and bash cannot undo it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # pytest-xdist, which it imports, is there only where this is called.
    from tests.side_by_side import Scheduling

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        from tests.side_by_side import longest_first

        longest_first(items)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, one subfolder each."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ALLREDUCE_SGD_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set ALLREDUCE_SGD_TEST_DATA")
    return folder


@pytest.fixture(autouse=True)
def _hooks_of_this_process() -> Iterator[None]:
    """Put back what a run within the test's own process installs for its whole life."""
    hooks = sys.excepthook, threading.excepthook
    yield
    sys.excepthook, threading.excepthook = hooks
