"""Stands in for Python as the program of a sweep's trials: does to the files what the trainer does, and trains nothing.

`python stand_in.py -m allreduce_sgd.train ARGUMENTS...`. What becomes of a training is said by its learning rate; the
metric is the learning rate.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

ENDS, WAITS, BREAKS, HANGS, DIES, STOPS = 0.1, 0.2, 0.3, 0.4, 0.5, 0.6


def main() -> None:
    if os.environ.get("PMI_RANK", "0") != "0":
        # The first rank alone is enough.
        return
    words = sys.argv[3:]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    resumed = flags.get("--resume")
    folder = Path(resumed or flags["--output"])
    folder.mkdir(parents=True, exist_ok=resumed is not None)
    if resumed is None:
        (folder / "config.json").write_text(json.dumps(flags))
    lr = float(json.loads((folder / "config.json").read_text())["--lr"])
    (folder / "pid").write_text(str(os.getpid()))
    print("cores", *sorted(os.sched_getaffinity(0)), "threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
    if resumed is None and lr == WAITS:
        wait_for_signal(folder)
    if lr == BREAKS:
        raise RuntimeError("the model has fallen apart")
    if lr == HANGS:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        (folder / "waiting").touch()
        time.sleep(600)
    if lr == DIES:
        os.kill(os.getpid(), signal.SIGKILL)
    if resumed is None and lr == STOPS:
        save(folder)
    (folder / "summary.json").write_text(json.dumps({"test_accuracy": lr}))


def wait_for_signal(folder: Path) -> NoReturn:
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: save(folder))
    (folder / "waiting").touch()
    time.sleep(600)
    raise AssertionError


def save(folder: Path) -> NoReturn:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").touch()
    sys.exit(75)


if __name__ == "__main__":
    main()
