"""The folder of a report: an earlier one stays where the new one does not come to its end."""

import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks.report.folder import new_folder
from tests.launching import finish, start

MAKING = """
import sys, time
from pathlib import Path
from benchmarks.report.folder import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "index.html").write_text("new")
    time.sleep(600)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An earlier report."""
    place = tmp_path / "report"
    place.mkdir()
    (place / "index.html").write_text("earlier")
    return place


def contents(place: Path) -> tuple[list[str], str]:
    return [path.name for path in place.parent.iterdir()], (place / "index.html").read_text()


def test_a_new_report_takes_the_place_of_the_earlier_one(place: Path) -> None:
    with new_folder(place) as folder:
        (folder / "index.html").write_text("new")
        assert (place / "index.html").read_text() == "earlier"
    assert contents(place) == (["report"], "new")


def test_a_thread_other_than_the_main_one_may_make_a_report(place: Path) -> None:
    def make() -> None:
        with new_folder(place) as folder:
            (folder / "index.html").write_text("new")

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert contents(place) == (["report"], "new")


@pytest.mark.parametrize("failure", [OSError, ZeroDivisionError, KeyboardInterrupt])
def test_a_failure_while_it_is_made_leaves_the_earlier_report(place: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), new_folder(place):
        raise failure
    assert contents(place) == (["report"], "earlier")


@pytest.mark.parametrize(("at", "renames", "kept"), [(1, True, "earlier"), (2, False, "earlier"), (2, True, "new")])
def test_an_interruption_while_it_takes_its_place_leaves_one_report(
    place: Path, monkeypatch: pytest.MonkeyPatch, at: int, renames: bool, kept: str
) -> None:
    """First the earlier report is renamed, then the new one."""
    rename = Path.rename
    calls: list[Path] = []

    def interrupted(self: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) != at or renames:
            rename(self, target)
        if len(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(place) as folder:
        (folder / "index.html").write_text("new")
    assert contents(place) == (["report"], kept)


def test_sigterm_leaves_the_earlier_report_and_nothing_else(place: Path) -> None:
    process = start(None, ["-c", MAKING, str(place)])
    limit_seconds = time.monotonic() + 60
    while not list(place.parent.glob(".report.*/new/index.html")) and time.monotonic() < limit_seconds:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    done = finish(process, time.monotonic(), 60)
    assert done.status == 128 + signal.SIGTERM
    assert done.errors == ""
    assert contents(place) == (["report"], "earlier")
