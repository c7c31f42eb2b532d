"""Runs the trials of a sweep, as many at once as there are places, and keeps what each comes to.

A training counts once its line stands in results.jsonl; one that was interrupted goes on from its checkpoint, or begins
afresh where it has none. One that fails is told of and stops nothing.
"""

import select
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from allreduce_sgd.command_line import words
from allreduce_sgd.errors import counted
from allreduce_sgd.failure import INTERRUPTED
from allreduce_sgd.mpirun import Launcher
from allreduce_sgd.sweep.places import Place
from allreduce_sgd.sweep.plan import Job, arguments_of, check_flags, folder_of, has_summary, log_of, seeds_of, value_of
from allreduce_sgd.sweep.process import Process
from allreduce_sgd.sweep.progress import Progress
from allreduce_sgd.sweep.results import Result, Results
from allreduce_sgd.sweep.search import Trial, promoted, rungs
from allreduce_sgd.sweep.spec import Halving, Spec

__all__ = ["PAUSED", "Runner", "Stop", "Stopped"]

PAUSED = 75
"""The status of a training, and of a sweep, that was told to stop and can go on."""
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 30.0


class Stopped(Exception):
    """The sweep was told to stop, and its trials are ended; `status` is what it ends with."""

    def __init__(self, status: int) -> None:
        super().__init__(f"stopped, status {status}")
        self.status = status


class Stop:
    """Takes SIGINT, SIGTERM and SIGUSR1 within its `with` block: the first asks for a stop, a second one to hurry."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._handlers[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)


class Runner:
    """Runs `trials` into the folder `output`, whose lock is the descriptor `lock`.

    `launcher` None: trials of one rank, without a launcher. `bind`: trials keep to the cores and GPUs of their places.
    """

    def __init__(
        self,
        spec: Spec,
        trials: Sequence[Trial],
        output: Path,
        results: Results,
        places: Sequence[Place],
        ranks_per_trial: int,
        launcher: Launcher | None,
        bind: bool,
        lock: int,
        stop: Stop,
    ) -> None:
        self._spec = spec
        self._trials = {each.number: each for each in trials}
        self._output = output
        self._results = results
        self._places = places
        self._ranks_per_trial = ranks_per_trial
        self._launcher = launcher
        self._bind = bind
        self._lock = lock
        self._stop = stop
        self._running: dict[int, tuple[Job, Process]] = {}

    def run(self) -> None:
        """Run what has not ended yet. Raises Stopped where a signal came, and OutputError."""
        halving = self._spec.halving
        with Progress(self._units(), len(self._places)) as progress:
            try:
                if halving is None:
                    self._run(self._jobs(self._trials), progress)
                else:
                    self._halve(halving, progress)
            finally:
                # All at once, and then one after another.
                for _, process in self._running.values():
                    process.terminate()
                for _, process in self._running.values():
                    process.kill()

    def _halve(self, halving: Halving, progress: Progress) -> None:
        going, before = list(self._trials), 0
        for reach in rungs(halving):
            self._run(self._jobs(going, reach, before), progress)
            if reach == halving.largest:
                return
            tried = {number: self._value(number, reach) for number in going}
            going, before = promoted(tried, halving.eta, self._spec.goal), reach
            told = ", ".join(map(str, going)) or "none"
            progress.line(f"after {halving.told(reach)} {len(going)} of {counted(len(tried), 'trial')} go on: {told}")

    def _units(self) -> int:
        """Return how many units of work the whole sweep has, if no trial fails."""
        jobs_per_trial = self._spec.seeds
        if self._spec.halving is None:
            return len(self._trials) * jobs_per_trial
        units, going, before = 0, len(self._trials), 0
        for reach in rungs(self._spec.halving):
            units += going * jobs_per_trial * (reach - before)
            going, before = -(-going // self._spec.halving.eta), reach
        return units

    def _value(self, number: int, reach: int) -> float | None:
        found = [self._results.get(number, seed, reach) for seed in seeds_of(self._spec, self._trials[number])]
        values = [each.value for each in found if each is not None and each.value is not None]
        return statistics.median(values) if len(values) == len(found) else None

    def _jobs(self, numbers: Iterable[int], reach: int | None = None, before: int = 0) -> list[Job]:
        trials = [self._trials[number] for number in numbers]
        return [Job(trial, seed, reach, before) for trial in trials for seed in seeds_of(self._spec, trial)]

    def _run(self, jobs: Sequence[Job], progress: Progress) -> None:
        """Run the jobs that have no result yet, in their order, and return when all have ended."""
        waiting = deque(jobs)
        while waiting or self._running:
            if self._stop.signals:
                self._end_all(progress)
            free = [index for index in range(len(self._places)) if index not in self._running]
            while waiting and free:
                job = waiting.popleft()
                if not self._settled(job, progress):
                    self._start(job, free.pop(0))
            progress.running(", ".join(str(job.trial.number) for job, _ in self._running.values()))
            self._wait(_LOOK_SECONDS)
            for job, process, status in self._gone():
                if not self._ended(job, process, status, progress):
                    waiting.appendleft(job)
                    if not self._stop.signals:
                        # By somebody else: as schedulers do that signal all processes of a job.
                        self._stop.signals.append(signal.SIGUSR1)

    def _settled(self, job: Job, progress: Progress) -> bool:
        """Say whether there is nothing to run, since the job has a result, or comes to one without running."""
        if self._results.get(job.trial.number, job.seed, job.reach) is not None:
            progress.ended(job.units, None)
            return True
        refused = check_flags(self._spec, job.trial)
        if refused is not None:
            self._keep(job, None, refused, 0.0, progress)
            return True
        # Of a training that ended just before the sweep was killed; or at its target, rungs ago.
        return has_summary(self._output, self._spec, job) and self._conclude(job, 0.0, progress)

    def _start(self, job: Job, index: int) -> None:
        arguments = arguments_of(self._output, self._spec, job)
        log = log_of(folder_of(self._output, self._spec, job.trial.number, job.seed))
        self._running[index] = (
            job,
            Process(self._launcher, self._ranks_per_trial, arguments, self._places[index], self._bind, log, self._lock),
        )

    def _wait(self, seconds: float) -> None:
        """Wait until a process ends, or a signal comes, at most so long."""
        if self._running:
            select.select([process.descriptor for _, process in self._running.values()], [], [], seconds)

    def _gone(self) -> Iterator[tuple[Job, Process, int | None]]:
        """Yield the processes that have ended, with their status, None for one that was ended as overdue."""
        limit_seconds = self._spec.timeout_seconds
        for index, (job, process) in list(self._running.items()):
            status = process.status()
            overdue = status is None and limit_seconds is not None and process.seconds > limit_seconds
            if overdue:
                process.kill()
            if overdue or status is not None:
                del self._running[index]
                process.close()
                yield job, process, status

    def _ended(self, job: Job, process: Process, status: int | None, progress: Progress) -> bool:
        """Keep what the job came to, and say whether it came to anything: not where it was told to stop before."""
        if status in (0, PAUSED) and self._conclude(job, process.seconds, progress):
            return True
        if status == PAUSED or (self._stop.signals and status is not None):
            return False
        why = f"not at its end after {self._spec.timeout_seconds} s" if status is None else process.error(status)
        self._keep(job, None, why, process.seconds, progress)
        return True

    def _conclude(self, job: Job, seconds: float, progress: Progress) -> bool:
        """Keep the value that the job's files have; say whether they have come to where it ends."""
        try:
            value = value_of(self._output, self._spec, job)
        except ValueError as problem:
            self._keep(job, None, str(problem), seconds, progress)
            return True
        if value is not None:
            self._keep(job, value, None, seconds, progress)
        return value is not None

    def _keep(self, job: Job, value: float | None, error: str | None, seconds: float, progress: Progress) -> None:
        number, parameters = job.trial.number, dict(job.trial.parameters)
        seconds = round(seconds, 3)
        self._results.append(
            Result(number, job.seed, job.reach, parameters, value, error, seconds, self._ranks_per_trial)
        )
        progress.ended(job.units, seconds if seconds > 0 else None)
        flags = " ".join(words(parameters))
        halving = self._spec.halving
        reach = "" if halving is None or job.reach is None else f" after {halving.told(job.reach)}"
        seed = f", seed {job.seed}" if self._spec.seeds > 1 else ""
        came = f"{self._spec.metric} {value:.6g}" if value is not None else f"failed: {error}"
        progress.line(f"trial {number}{seed}: {flags}: {came}{reach}   {seconds:.1f} s   ({progress.share})")

    def _end_all(self, progress: Progress) -> NoReturn:
        """Have all trials write checkpoints and end, keep what has come to its end meanwhile, and raise Stopped."""
        first = self._stop.signals[0]
        grace_seconds = float(self._spec.trainer.get("grace-seconds", _GRACE_SECONDS))
        if self._running:
            progress.line(
                f"stopping: {counted(len(self._running), 'trial')} under way; a second signal ends all at once"
            )
        for _, process in self._running.values():
            process.ask_to_stop()
        deadline = time.monotonic() + grace_seconds
        while self._running and time.monotonic() < deadline and len(self._stop.signals) < 2:
            self._wait(_LOOK_SECONDS)
            for job, process, status in self._gone():
                self._ended(job, process, status, progress)
        raise Stopped(INTERRUPTED if first == signal.SIGINT else PAUSED)
