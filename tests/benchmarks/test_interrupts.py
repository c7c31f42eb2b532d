"""Programs that start ranks, ended early: what they started ends, and what they were making is not left behind."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.interrupts import ended_in_order
from tests.benchmarks.stand_in_launcher import stand_in_launcher
from tests.launching import finish, start

# Tells its process, and does not end by itself.
ENDLESS = 'echo $$ > "$STARTED.new" && mv "$STARTED.new" "$STARTED"\nexec sleep 600'
STUDY = "benchmarks.time_to_accuracy digits-quick --only DDP"


@pytest.mark.parametrize(
    ("program", "number"),
    [
        ("benchmarks.chaos", signal.SIGTERM),
        ("benchmarks.course epoch_time --dataset synthetic:64,8,2 --ranks 2", signal.SIGTERM),
        ("benchmarks.startup", signal.SIGTERM),
        ("benchmarks.strategies --dataset synthetic:64,8,2", signal.SIGTERM),
        ("benchmarks.compression --dataset synthetic:64,8,2 --ranks 2", signal.SIGTERM),
        (STUDY, signal.SIGTERM),
        (STUDY, signal.SIGINT),
    ],
)
def test_a_program_ended_early_ends_what_it_started(tmp_path: Path, program: str, number: int) -> None:
    started, temporary = tmp_path / "started", tmp_path / "temporary"
    temporary.mkdir()
    environment = {
        "MPIRUN": stand_in_launcher(tmp_path, ENDLESS),
        "STARTED": str(started),
        "TMPDIR": str(temporary),
    }
    process = start(None, ["-m", *program.split()], environment, cwd=tmp_path)
    limit_seconds = time.monotonic() + 60
    while not started.exists() and process.poll() is None and time.monotonic() < limit_seconds:
        time.sleep(0.02)
    process.send_signal(number)
    done = finish(process, time.monotonic(), 60)
    assert started.exists(), done.errors
    assert done.status == 128 + number
    assert done.errors == ""
    assert not psutil.pid_exists(int(started.read_text()))
    assert list(temporary.iterdir()) == []


def test_a_second_signal_does_not_cut_short_what_the_first_began() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cleaned_up = []

    def be_ended_twice() -> None:
        with ended_in_order():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGTERM)
                cleaned_up.append(True)

    with pytest.raises(SystemExit) as ended:
        be_ended_twice()
    assert cleaned_up
    assert ended.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ended_in_order():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
