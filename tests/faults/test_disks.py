"""A disk that is full or cannot be written: status 1, one line, and the last checkpoint is intact and can be resumed.

The disk is a file system in memory, mounted where nobody else sees it, and gone with the run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.jobs import TRAIN, leaving_nothing, newest_step
from tests.launch.requirements import require_root
from tests.launching import ROOT, environment_with, find_mpirun, python

# What a run left on the disk is copied to where the test can read it.
ON_A_DISK = """
set -e
mount -t tmpfs -o "size=$1" disk "$2/disk"
status=0
shift 2
"$@" || status=$?
cp -r "$DISK/run" "$DISK/../left"
exit $status
"""

# Does what it is told after the first checkpoint, and then goes on training.
MISHAP = """
import os, subprocess, sys
from allreduce_sgd import checkpoint, train, trainer

usual = checkpoint.save

def save(folder, step, shared, own, keep, comm):
    usual(folder, step, shared, own, keep, comm)
    if step == int(os.environ["TEST_STEP"]) and comm.rank == 0:
        subprocess.run(os.environ["TEST_MISHAP"], shell=True, check=False, stderr=subprocess.DEVNULL)

checkpoint.save = save
sys.exit(train.main(sys.argv[1:]))
"""

FILL = 'cat /dev/zero > "$DISK/filler"'
PROTECT = 'cd "$DISK/run/checkpoints"; mount --bind . "$PWD"; mount -o remount,bind,ro "$PWD"'


def run_on_a_disk(folder: Path, ranks: int, mishap: str, step: int, *flags: str) -> subprocess.CompletedProcess[str]:
    require_root()
    disk = folder / "disk"
    disk.mkdir()
    launcher = [find_mpirun(), "-n", str(ranks)] if ranks > 1 else []
    program = [sys.executable, "-c", MISHAP, *TRAIN[2:], "--model", "linear", "--output", str(disk / "run"), *flags]
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("no mount namespaces here")
    with leaving_nothing() as mark:
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", ON_A_DISK, "sh", "4m", str(folder), *launcher, *program],
            env=environment_with({"DISK": str(disk), "TEST_MISHAP": mishap, "TEST_STEP": str(step), **mark}),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
        )


def the_line_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that tells what failed; the launcher may say more."""
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "annot write" in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.root
@pytest.mark.parametrize(
    ("mishap", "why"),
    [(FILL, "No space left on device"), (PROTECT, "Read-only file system")],
    ids=["full", "read-only"],
)
def test_a_checkpoint_that_cannot_be_written_ends_all_in_one_line(tmp_path: Path, mishap: str, why: str) -> None:
    # Little is logged before, so that there is room for it in what the log has of the disk.
    done = run_on_a_disk(tmp_path, 2, mishap, 4, "--log-every", "1000")
    line = the_line_of(done)
    assert line.startswith("rank 0 of 2 on ")
    assert line.endswith(f": rank 0 cannot write a checkpoint into {tmp_path}/disk/run/checkpoints: {why}")
    left = tmp_path / "left"
    assert newest_step(left) == 4
    assert not [name for name in os.listdir(left / "checkpoints") if name.endswith(".tmp")]


@pytest.mark.root
def test_a_log_that_cannot_be_written_ends_a_run_in_one_line_and_it_can_go_on_elsewhere(tmp_path: Path) -> None:
    flags = ["--log-every", "1", "--steps", "60", "--checkpoint-every", "30"]
    done = run_on_a_disk(tmp_path, 1, FILL, 30, *flags)
    line = the_line_of(done)
    assert line == f"allreduce-sgd: error: cannot write {tmp_path}/disk/run/metrics.jsonl: No space left on device"
    assert newest_step(tmp_path / "left") == 30
    again = python([*TRAIN[:2], "--resume", str(tmp_path / "left")])
    assert (again.status, again.errors) == (0, "")
    assert newest_step(tmp_path / "left") == 60
