"""Some rounds of killing and resuming, and what is refused. All 500 take most of an hour."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos import main, rows_of, table
from benchmarks.chaos_rounds import Chaos, Round
from tests.benchmarks.stand_in_launcher import stand_in_launcher
from tests.launching import environment_with, finish, start

# Runs end at once with the same parameters, but for the third, which does not end by itself.
ENDLESS_AFTER_TWO = """\
while [ "$1" != --output ]; do shift; done
echo $$ > "$STARTED"
mkdir "$2"
case "$2" in *course-2) exec sleep 600;; esac
echo '{"parameters_sha256": "abc", "wall_seconds": 0.01}' > "$2/new" && mv "$2/new" "$2/summary.json"
"""


def test_rounds_end_and_come_to_the_parameters_of_the_undisturbed_run(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    flags = ["--rounds", "3", "--steps", "300", "--seed", "3", "--deadline-seconds", "100", "--timeout-seconds", "60"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", *flags, "--folder", str(tmp_path), "--json", str(record)],
        env=environment_with({}),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    rows = json.loads(record.read_text())["rows"]
    assert sum(row["rounds"] for row in rows) >= 3
    assert sum(row["rounds"] for row in rows if row["harm"] != "none") >= 1
    # The last course is brought to its end, so that every harm has been made good.
    assert sum(row["finished"] for row in rows) >= 1
    assert all(row["problems"] == [] for row in rows)
    assert "with the parameters of the undisturbed run; 0 problems" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_call_that_is_ended_early_tells_the_rounds_that_are_done(tmp_path: Path) -> None:
    record, started, folder = tmp_path / "record.json", tmp_path / "started", tmp_path / "runs"
    folder.mkdir()
    environment = {"MPIRUN": stand_in_launcher(tmp_path, ENDLESS_AFTER_TWO), "STARTED": str(started)}
    process = start(None, ["-m", "benchmarks.chaos", "--folder", str(folder), "--json", str(record)], environment)
    limit_seconds = time.monotonic() + 60
    while not list(folder.glob("*/course-2")) and process.poll() is None and time.monotonic() < limit_seconds:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    done = finish(process, time.monotonic(), 60)
    assert done.status == 128 + signal.SIGTERM
    assert done.errors == ""
    rows = json.loads(record.read_text())["rows"]
    assert sum(row["finished"] for row in rows) == 2
    rounds = sum(row["rounds"] for row in rows)
    assert f"{rounds} rounds of 500, seed 0: 2 runs came to the end with the parameters" in done.output
    assert list(folder.iterdir()) == []
    assert _has_ended(int(started.read_text()))


def _has_ended(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_last_round_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIRUN", stand_in_launcher(tmp_path, "exec sleep 600"))
    chaos = Chaos(tmp_path, 2, {"steps": 10}, 0.02, random.Random(0))
    done = chaos.round(harmed=False)
    assert (done.harm, done.status, chaos.course) == (None, -signal.SIGKILL, 1)
    assert str(done.problem).startswith("not ended in 0.4 s: processes [")


def test_what_training_refuses_is_a_bad_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = "echo 'allreduce-sgd: error: --strategy: unknown' >&2; exit 2"
    monkeypatch.setenv("MPIRUN", stand_in_launcher(tmp_path, refusal))
    assert main(["--strategy", "nonsense", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "chaos: error: --strategy: unknown\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mpirun"]


def test_what_is_not_in_order_is_seen(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, 2, {"steps": 10}, 60.0, random.Random(0), parameters="abc")
    chaos.run.mkdir()

    def judged(status: int, harm: str | None, parameters: str | None) -> Round:
        done = Round(0, harm)
        if parameters is not None:
            (chaos.run / "summary.json").write_text(json.dumps({"parameters_sha256": parameters}))
        chaos._judge(status, "some words", done)
        return done

    assert judged(-signal.SIGKILL, "kill-all", None).problem is None
    assert judged(2, "kill-all", None).problem == "refused to start: some words"
    assert judged(1, None, None).problem == "ended with status 1, though nothing was done to it: some words"
    assert judged(0, None, "abc").problem is None
    assert judged(0, None, "abd").problem == "came to other parameters than the undisturbed run"


def test_the_table_has_a_row_for_each_harm() -> None:
    rounds = [
        Round(0, "kill-rank", 1.0, 0.5, 9),
        Round(0, "kill-rank", 2.0, 1.5, 9, resumed_step=20),
        Round(0, None, None, 3.0, 0, finished=True, resumed_step=40),
        Round(1, "preempt", 1.0, 0.2, 75, finished=True, problem="lost"),
    ]
    rows = rows_of(rounds)
    assert [(row["harm"], row["rounds"], row["resumed"], row["finished"]) for row in rows] == [
        ("kill-rank", 2, 1, 0),
        ("preempt", 1, 0, 0),
        ("none", 1, 1, 1),
    ]
    assert (rows[0]["slowest_end_seconds"], rows[0]["statuses"]) == (1.5, {"9": 2})
    assert len(rows[1]["problems"]) == 1
    assert table(rows).splitlines()[2].split() == ["kill-rank", "2", "1", "0", "1.50", "0", "9:", "2"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--timeout-seconds", "70"], "--timeout-seconds 70: choose less than --deadline-seconds"),
        (["--folder", "/none"], "--folder /none: there is no such folder"),
        (["--json", "/none/file"], "--json /none/file"),
    ],
)
def test_bad_arguments_get_one_line(capsys: pytest.CaptureFixture[str], flags: list[str], named: str) -> None:
    assert main(flags) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert named in errors
