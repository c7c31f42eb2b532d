"""Ranks with another configuration, other code, other data or a damaged file do not train: status 2, and one line.

A run whose checkpoint is damaged is refused in tests/test_resume.py; see tests/test_checkpoint.py for every damage.
"""

import json
import shutil
from pathlib import Path

import numpy as np

import allreduce_sgd
from tests.faults.jobs import leaving_nothing
from tests.launching import mpirun

# Each of these begins a training on two ranks, in the same processes; rank 1 has something of its own.
ATTEMPTS = """
import json, os, sys
from pathlib import Path
from allreduce_sgd import checks
from allreduce_sgd.topology import launcher_rank
from allreduce_sgd.train import main

folder, rank = Path(sys.argv[1]), launcher_rank(os.environ)
os.chdir(folder / f"host{rank}")

def attempt(*flags):
    return main(["--model", "linear", "--steps", "2", "--output", str(folder / "run"), *flags])

statuses = [
    attempt("--lr", "0.3" if rank == 1 else "0.1"),
    attempt("--dataset", "tests.faults.victims:drawn_by_each_rank"),
    attempt("--dataset", "tests.faults.victims:fewer_on_rank_1"),
    attempt("--dataset", "npz:data.npz"),
]
if rank == 1:
    checks.__file__ = str(folder / "copy" / "checks.py")
statuses.append(attempt())
os.write(1, (json.dumps(statuses) + "\\n").encode())
"""


def test_ranks_that_differ_do_not_train_and_what_differs_is_named(tmp_path: Path) -> None:
    package = Path(allreduce_sgd.__file__).parent
    shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "copy" / "optim" / "schedule.py").open("a") as file:
        file.write("# an older version\n")
    generator = np.random.default_rng(0)
    inputs, targets = generator.random((40, 3), dtype=np.float32), generator.integers(0, 2, 40)
    for rank in range(2):
        (tmp_path / f"host{rank}").mkdir()
        np.savez(tmp_path / f"host{rank}" / "data.npz", x_train=inputs, y_train=targets, x_test=inputs, y_test=targets)
    damaged = tmp_path / "host1" / "data.npz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with leaving_nothing() as mark:
        done = mpirun(2, ["-c", ATTEMPTS, str(tmp_path)], environment=mark)
    assert [json.loads(line) for line in done.output.splitlines()] == [[2] * 5] * 2, done.errors
    lines = [line.removeprefix("allreduce-sgd: error: ") for line in done.errors.splitlines()]
    assert len(lines) == 5, done.errors
    assert "--lr: rank 0 has 0.1, but rank 1 has 0.3" in lines
    (drawn,) = (line for line in lines if "drawn_by_each_rank" in line)
    assert drawn.count("has 30 training samples (hash ") == 2
    assert ", but rank 1 on " in drawn
    (fewer,) = (line for line in lines if "fewer_on_rank_1" in line)
    assert ": rank 0 on " in fewer
    assert "has 30 training samples" in fewer
    assert "has 29 training samples" in fewer
    (damage,) = (line for line in lines if "data.npz" in line)
    assert "(rank 1 on " in damage
    (code,) = (line for line in lines if line.startswith("code: rank 0 on "))
    assert f"of {package} (hash " in code
    assert f"of {tmp_path / 'copy'} (hash " in code
    assert not (tmp_path / "run").exists()
