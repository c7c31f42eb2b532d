"""Sweeps as users start them: trials side by side, stopped, killed, gone on with. Only some really train.

The others' trials are the stand-in's, so that what becomes of them is known, and no time is spent on importing torch.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import warm_start
from tests.launching import Finished, find_mpirun, finish, start
from tests.sweep import stand_in

STAND_IN = shlex.join([sys.executable, "-I", "-S", str(Path(stand_in.__file__))])
DEADLINE_SECONDS = 120
TINY = '[trainer]\ndataset = "digits"\nmodel = "linear"\ndevice = "cpu"\nthreads = 1\n'


@contextlib.contextmanager
def sweep(arguments: Sequence[str], python: str = STAND_IN) -> Iterator[subprocess.Popen[str]]:
    """Start a sweep; whatever happens, it ends with the test."""
    process = start(None, ["-m", "allreduce_sgd.sweep", *arguments], {"PYTHON": python, "MPIRUN": ""})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run(arguments: Sequence[str], python: str = STAND_IN) -> Finished:
    with sweep(arguments, python) as process:
        return finish(process, time.monotonic(), DEADLINE_SECONDS)


def spec_of(tmp_path: Path, rates: Sequence[float], more: str = "") -> list[str]:
    """Return the arguments of a sweep over these learning rates, two at once."""
    file = tmp_path / "spec.toml"
    file.write_text(f'method = "grid"\n{more}\n[parameters]\nlr = {list(rates)}\n')
    return [str(file), "--output", str(tmp_path / "out"), "--ranks", "2"]


def results_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def is_gone(folder: Path) -> bool:
    """Say whether the process of the trial in this folder has ended."""
    status = Path(f"/proc/{(folder / 'pid').read_text()}/stat")
    return not status.exists() or ") Z " in status.read_text()


def starts(out: Path, trial: int) -> list[str]:
    """Return the command lines with which a trial was started."""
    lines = (out / "trials" / f"{trial:03d}.log").read_text().splitlines()
    return [line for line in lines if line.startswith("$ ")]


def test_trials_side_by_side_have_cores_of_their_own_and_failures_stop_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rates = [stand_in.ENDS, stand_in.BREAKS, 0.11, stand_in.DIES, 0.12, 0.13]
    done = run(spec_of(tmp_path, rates))
    assert (done.status, done.errors) == (0, "")
    by_trial = {each["trial"]: each for each in results_of(out)}
    assert {number: each["value"] for number, each in by_trial.items()} == {
        0: 0.1,
        1: None,
        2: 0.11,
        3: None,
        4: 0.12,
        5: 0.13,
    }
    assert by_trial[1]["error"] == "status 1: RuntimeError: the model has fallen apart"
    assert by_trial[3]["error"].startswith("ended by SIGKILL")
    assert "best: trial 5, test_accuracy 0.13: --lr 0.13" in done.output
    assert "100 %" in done.output
    table = (out / "table.md").read_text()
    assert table in done.output
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["5", "4", "2", "0", "1", "3"]
    assert (out / "parallel.png").read_bytes()[:4] == b"\x89PNG"
    told = [(out / "trials" / f"{trial:03d}.log").read_text().splitlines()[1].split() for trial in by_trial]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        halves = {frozenset(map(str, cores[: len(cores) // 2])), frozenset(map(str, cores[len(cores) // 2 :]))}
        assert {frozenset(words[1 : words.index("threads")]) for words in told} == halves
    # A finished sweep has nothing to do; what has failed may be tried again.
    before = (out / "results.jsonl").read_text()
    again = run(["--resume", str(out)])
    assert again.status == 0
    assert (out / "results.jsonl").read_text() == before
    assert [len(starts(out, trial)) for trial in range(6)] == [1] * 6
    # Called after its file, as before.
    assert again.output.startswith("spec: 6 trials")
    assert run(["--resume", str(out), "--retry-failed"]).status == 0
    assert [len(starts(out, trial)) for trial in range(6)] == [1, 2, 1, 2, 1, 1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_sweep_that_is_stopped_or_killed_goes_on_where_its_trials_were(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    out = tmp_path / "out"
    trials = [out / "trials" / f"{trial:03d}" for trial in range(4)]
    with sweep(spec_of(tmp_path, [stand_in.ENDS, stand_in.WAITS, 0.2000001, 0.3000001])) as process:
        wait_until((trials[1] / "waiting").exists, "the second trial")
        # Whichever of the others are done by then.
        wait_until(lambda: (out / "results.jsonl").exists(), "the first trial")
        process.send_signal(number)
        output, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, errors) == (status, "")
    if status > 0:
        assert f"stopped; go on with --resume {out}" in output
        assert is_gone(trials[1])
    wait_until(lambda: is_gone(trials[1]), "the end of the trial whose sweep was killed")
    finished = {each["trial"] for each in results_of(out)}
    assert 1 not in finished
    again = run(["--resume", str(out)])
    assert again.status == 0
    assert {each["trial"]: each["value"] for each in results_of(out)} == {0: 0.1, 1: 0.2, 2: 0.2000001, 3: 0.3000001}
    assert len(results_of(out)) == 4
    first, second = starts(out, 1)
    assert "--output" in first
    assert f"--resume {trials[1]}" in second
    for trial in finished:
        assert len(starts(out, trial)) == 1


def test_a_trial_that_does_not_end_is_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    hanging = out / "trials" / "000"
    with sweep(spec_of(tmp_path, [stand_in.HANGS])) as process:
        wait_until((hanging / "waiting").exists, "the trial")
        # One that began afresh and has no checkpoint is none to go on from.
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 75
    assert "a second signal ends all at once" in output
    assert is_gone(hanging)
    (out / "sweep.toml").write_text("timeout_seconds = 1\n" + (out / "sweep.toml").read_text())
    overdue = run(["--resume", str(out)])
    assert overdue.status == 1
    assert "all trials failed; the first: not at its end after 1 s" in overdue.errors
    assert is_gone(hanging)


def test_a_trial_that_others_have_stopped_stops_the_sweep(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(spec_of(tmp_path, [stand_in.STOPS])).status == 75
    assert not (out / "results.jsonl").exists()
    assert run(["--resume", str(out)]).status == 0
    assert results_of(out)[0]["value"] == stand_in.STOPS


def test_a_folder_that_is_used_or_at_work_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = spec_of(tmp_path, [stand_in.WAITS])
    with sweep(arguments) as process:
        wait_until((out / "trials" / "000" / "waiting").exists, "the trial")
        used = run(arguments)
        assert used.status == 2
        assert f"already used; name a new one, or go on in it with --resume {out}" in used.errors
        with sweep(["--resume", str(out)]) as second:
            assert second.stderr is not None
            assert "waiting for trials that are still at work" in second.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_SECONDS) == 75
            second.communicate(timeout=DEADLINE_SECONDS)
    assert second.returncode == 0
    assert results_of(out)[0]["value"] == stand_in.WAITS


def test_a_grid_trains_two_trials_at_once(tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(f'method = "grid"\n{TINY}steps = 3\n[parameters]\noptimizer = ["sgd", "adam"]\nmomentum = [0.5]\n')
    out = tmp_path / "out"
    done = run([str(file), "--output", str(out), "--ranks", "2"], shlex.join(warm_start.program()))
    assert (done.status, done.errors) == (0, "")
    assert {each["trial"]: each["error"] for each in results_of(out)} == {
        0: None,
        1: "status 2: --momentum: Adam has no such option",
    }
    summary = json.loads((out / "trials" / "000" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert results_of(out)[0]["value"] == summary["test_accuracy"] or results_of(out)[1]["value"] is not None


def test_halving_pauses_trials_of_two_ranks_and_goes_on_with_the_best(tmp_path: Path) -> None:
    find_mpirun()
    file = tmp_path / "spec.toml"
    file.write_text(
        'method = "halving"\nmetric = "test_loss"\n[halving]\nsmallest = 2\nlargest = 4\neta = 2\nunit = "steps"\n'
        f'{TINY}lr-schedule = "cosine"\nevaluate-every = 3\n[parameters]\nlr = [1e-6, 0.1]\n'
    )
    out = tmp_path / "out"
    arguments = [str(file), "--output", str(out), "--ranks", "4", "--ranks-per-trial", "2"]
    done = run(arguments, shlex.join(warm_start.program()))
    assert (done.status, done.errors) == (0, "")
    assert "after 2 steps 1 of 2 trials go on: 1" in done.output
    found = {(each["trial"], each["reach"]): each for each in results_of(out)}
    assert found.keys() == {(0, 2), (1, 2), (1, 4)}
    assert {each["ranks"] for each in found.values()} == {2}
    assert found[1, 4]["value"] < found[1, 2]["value"] < found[0, 2]["value"]
    summary = json.loads((out / "trials" / "001" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["test_loss"]) == (2, 4, found[1, 4]["value"])
    assert (out / "trials" / "000" / "checkpoints" / "step-00000002").is_dir()
    assert "--pause-after-steps 2" in starts(out, 1)[0]
    assert f"--resume {out}/trials/001" in starts(out, 1)[1]
