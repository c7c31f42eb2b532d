"""The rounds of chaos.py: a start of the ranks, what is done to them at a random time, and what they leave."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.runs import find_mpirun, train, words

__all__ = ["HARMS", "Chaos", "Round"]

HARMS = {"kill-rank": 40, "kill-launcher": 15, "kill-all": 20, "terminate": 10, "preempt": 13, "stop-rank": 2}
"""What is done to a run, and how often in a hundred rounds."""

_MARK = "ALLREDUCE_SGD_CHAOS"
_POLL_SECONDS = 0.02
# A run that resumes at its last step still has to end.
_LEAST_LEFT = 1e-3
_KILLING_SECONDS = 10
# A whole run, in times of the deadline after which a harmed one has ended.
_WHOLE_RUN = 20
_FAILED_STATUS, _CONFIG_STATUS = 1, 2


@dataclass
class Round:
    """One start of the ranks. `harm` None: it came to its end before; `problem`: what was not in order."""

    course: int
    harm: str | None
    harmed_after_seconds: float | None = None
    ended_after_seconds: float | None = None
    status: int | None = None
    finished: bool = False
    resumed_step: int | None = None
    problem: str | None = None


@dataclass
class Chaos:
    """Rounds in `folder`: each `run` is one round of a training with these flags on so many ranks."""

    folder: Path
    ranks: int
    flags: dict[str, str | int | float]
    deadline_seconds: float
    draw: random.Random
    harms: dict[str, int] = field(default_factory=lambda: dict(HARMS))
    usual_seconds: float = 0.0
    train_seconds: float = 0.0
    parameters: str = ""
    course: int = 0

    @property
    def run(self) -> Path:
        return self.folder / f"course-{self.course}"

    def undisturbed(self) -> None:
        """Train without any harm, to know what to come to, and how long it takes. Raises RunFailed."""
        began_seconds = time.monotonic()
        whole = self.folder / "undisturbed"
        train(self.ranks, {**self.flags, "output": str(whole)}, int(_WHOLE_RUN * self.deadline_seconds))
        self.usual_seconds = time.monotonic() - began_seconds
        summary = _summary(whole)
        self.parameters, self.train_seconds = summary["parameters_sha256"], summary["wall_seconds"]

    def round(self, harmed: bool = True) -> Round:
        """Start or resume the present course, harm it unless told not to, and wait for its end."""
        harm = self.draw.choices(list(self.harms), list(self.harms.values()))[0]
        done = Round(self.course, None)
        checkpoints = list((self.run / "checkpoints").glob("step-*"))
        if checkpoints:
            done.resumed_step = max(int(path.name.removeprefix("step-")) for path in checkpoints)
            flags: dict[str, str | int | float] = {"resume": str(self.run)}
        else:
            shutil.rmtree(self.run, ignore_errors=True)
            flags = {**self.flags, "output": str(self.run)}
        mark = str(uuid.uuid4())
        errors_file = self.folder / "errors"
        try:
            with errors_file.open("w") as errors:
                job = subprocess.Popen(
                    [*find_mpirun(), "-n", str(self.ranks), sys.executable, "-m", "allreduce_sgd.train", *words(flags)],
                    env={**os.environ, "OMP_NUM_THREADS": "1", _MARK: mark},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,
                )
            if harmed:
                self._wait_for_the_time(job, done.resumed_step)
                if job.poll() is None:
                    self._do(harm, job, mark, done)
                self._wait_for_the_end(job, mark, done, self.deadline_seconds)
            else:
                self._wait_for_the_end(job, mark, done, _WHOLE_RUN * self.deadline_seconds)
        finally:
            _kill(mark)
        self._judge(job.wait(_KILLING_SECONDS), errors_file.read_text(errors="replace"), done)
        if done.finished:
            if done.problem is None:
                shutil.rmtree(self.run)
            self.course += 1
        return done

    def _wait_for_the_time(self, job: "subprocess.Popen[bytes]", resumed_step: int | None) -> None:
        until_seconds = time.monotonic() + self.draw.uniform(0, self.usual_seconds)
        if self.draw.random() < 2 / 3:
            metrics = self.run / "metrics.jsonl"
            before = _size(metrics)
            # A resumed run drops what was logged after its checkpoint, and then logs.
            limit_seconds = time.monotonic() + self.deadline_seconds
            while _size(metrics) <= before and job.poll() is None and time.monotonic() < limit_seconds:
                time.sleep(_POLL_SECONDS)
            left = max(_LEAST_LEFT, 1 - (resumed_step or 0) / int(self.flags["steps"]))
            until_seconds = time.monotonic() + self.draw.uniform(0, left * self.train_seconds)
        while time.monotonic() < until_seconds and job.poll() is None:
            time.sleep(_POLL_SECONDS)

    def _do(self, harm: str, job: "subprocess.Popen[bytes]", mark: str, done: Round) -> None:
        processes = _processes(mark)
        ranks = [process for process in processes if process.pid != job.pid and _is_rank(process)]
        if not ranks and harm.endswith("-rank"):
            harm = "kill-all"
        done.harm = harm
        done.harmed_after_seconds = time.time() - psutil.Process(job.pid).create_time()
        victims, number = {
            "kill-rank": (ranks, signal.SIGKILL),
            "stop-rank": (ranks, signal.SIGSTOP),
            "kill-launcher": ([job], signal.SIGKILL),
            "kill-all": ([*processes, job], signal.SIGKILL),
            "terminate": ([job], signal.SIGTERM),
            "preempt": ([job], signal.SIGUSR1),
        }[harm]
        if harm.endswith("-rank"):
            victims = [self.draw.choice(ranks)]
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.send_signal(number)

    def _wait_for_the_end(self, job: "subprocess.Popen[bytes]", mark: str, done: Round, limit_seconds: float) -> None:
        harmed_seconds = time.monotonic()
        # One that is asked for a checkpoint trains on until then, and one that nobody harmed until its end.
        while job.poll() is None or _processes(mark):
            if time.monotonic() - harmed_seconds > limit_seconds:
                left = [process.pid for process in _processes(mark)]
                span = f"{limit_seconds:g} s"
                told = f"in {span}" if done.harm is None else f"{span} after {done.harm}"
                done.problem = f"not ended {told}: processes {left}"
                return
            time.sleep(_POLL_SECONDS)
        done.ended_after_seconds = time.monotonic() - harmed_seconds

    def _judge(self, status: int, errors: str, done: Round) -> None:
        done.status = status
        done.finished = (self.run / "summary.json").exists()
        told = " ".join(errors.split())[-300:]
        if done.problem is not None:
            done.finished = True
        elif status == _CONFIG_STATUS:
            done.problem = f"refused to start: {told}"
            done.finished = True
        elif done.harm is None and status != 0:
            done.problem = f"ended with status {status}, though nothing was done to it: {told}"
            done.finished = True
        elif status == 0 and not done.finished:
            done.problem = "ended with status 0, and has no summary"
            done.finished = True
        elif done.harm == "preempt" and status == _FAILED_STATUS:
            # Before it takes signals a run may die of one, which is another status.
            done.problem = f"ended with status {status} when it was asked for a checkpoint: {told}"
            done.finished = True
        elif done.finished and _summary(self.run)["parameters_sha256"] != self.parameters:
            done.problem = "came to other parameters than the undisturbed run"


def _processes(mark: str) -> list[psutil.Process]:
    """Return the living processes of the job with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kill(mark: str) -> None:
    """Kill what is left of the job with this mark, and wait until it is gone."""
    limit_seconds = time.monotonic() + _KILLING_SECONDS
    while (left := _processes(mark)) and time.monotonic() < limit_seconds:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(_POLL_SECONDS)


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()[:1] == [sys.executable]
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _summary(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary
