"""`--on-failure restart=K` of the launch scripts: from the last checkpoint, at most K times, on the hosts there are."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.faults.jobs import TRAIN, newest_step
from tests.launch.requirements import open_mpi
from tests.launch.test_launch_scripts import BIN, HOSTS, LOCAL, assert_one_line, run
from tests.launch.virtual_hosts import SCRIPT, processes_left, require_virtual_hosts
from tests.launching import ROOT, environment_with
from tests.test_train import lines_of, summary_of

FLAGS = [*TRAIN[2:], "--model", "tests.faults.victims:victim"]


def launch(
    folder: Path, fault: str, restarts: int, *arguments: str, programs: Path = BIN
) -> subprocess.CompletedProcess[str]:
    """Train on two ranks with mpirun_local.sh. With a file fault_time in the folder there is no fault any more."""
    return subprocess.run(
        [LOCAL, "-n", "2", "--on-failure", f"restart={restarts}", "--", *arguments],
        env=environment_with(
            {"TEST_FAULT": fault, "TEST_FAULT_TIME": str(folder / "fault_time"), "MPIRUN": str(programs / "mpirun")}
        ),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.fixture(autouse=True)
def needs_mpirun() -> None:
    if not (BIN / "mpirun").exists():
        pytest.skip("the environment brings no mpirun (pip install mpich)")


@pytest.mark.parametrize(("mpi", "status"), [("own", 9), ("openmpi", 137)])
def test_a_job_with_a_killed_rank_goes_on_from_its_last_checkpoint(tmp_path: Path, mpi: str, status: int) -> None:
    folder = tmp_path / "run"
    programs = BIN if mpi == "own" else open_mpi()
    flags = [*FLAGS, "--output", str(folder), "--log-every", "1"]
    done = launch(tmp_path, "kill compute 1 6", 2, *flags, programs=programs)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("mpirun_local.sh: ")]
    checkpoint = folder / "checkpoints" / "step-00000004"
    assert said == [f"mpirun_local.sh: ended with status {status}; restarting from {checkpoint} (restarts left: 1)"]
    assert f"resumed from {checkpoint} at step 4" in done.stdout
    assert summary_of(folder)["steps"] == 12
    assert [line["step"] for line in lines_of(folder) if line["event"] == "train"] == list(range(1, 13))


def test_after_the_last_restart_the_status_is_that_of_the_failure(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    checkpoint = folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    environment = {"MPIRUN": str(BIN / "mpirun"), "PROGRAM": str(program)}
    arguments = ["-n", "1", "--on-failure", "restart=1", "--config", "run.toml", f"--output={folder}", "--lr", "0.1"]
    done = run(LOCAL, *arguments, **environment)
    assert done.returncode == 7
    assert done.stdout.splitlines() == [
        str(["--config", "run.toml", f"--output={folder}", "--lr", "0.1"]),
        str(["--lr", "0.1", "--resume", str(folder)]),
    ]
    assert done.stderr.splitlines() == [
        f"mpirun_local.sh: ended with status 7; restarting from {folder}/checkpoints/step-00000004 (restarts left: 0)",
        "mpirun_local.sh: ended with status 7; no restart is left",
    ]
    checkpoint.rmdir()
    done = run(LOCAL, *arguments, **environment)
    assert done.returncode == 7
    assert done.stderr == f"mpirun_local.sh: ended with status 7; {folder} has no checkpoint to restart from\n"


@pytest.mark.parametrize("status", [0, 2, 75, 130])
def test_what_is_no_failure_is_not_repeated(tmp_path: Path, status: int) -> None:
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    program = tmp_path / "program.py"
    program.write_text(f"print('started')\nraise SystemExit({status})\n")
    arguments = ["-n", "1", "--on-failure", "restart=3", "--resume", str(tmp_path)]
    done = run(LOCAL, *arguments, MPIRUN=str(BIN / "mpirun"), PROGRAM=str(program))
    assert (done.returncode, done.stdout, done.stderr) == (status, "started\n", "")


def test_bad_arguments_get_one_line(tmp_path: Path) -> None:
    environment = {"MPIRUN": str(BIN / "mpirun"), "PYTHON": sys.executable}
    assert_one_line(run(LOCAL, "--on-failure", "ignore", **environment), "restart=K")
    assert_one_line(run(LOCAL, "--on-failure", "restart=0", **environment), "restart=0")
    assert_one_line(run(LOCAL, "--on-failure", "restart=1", "--lr", "1", **environment), "--output")
    host_file = tmp_path / "hosts"
    host_file.write_text("localhost\n")
    assert_one_line(run(HOSTS, str(host_file), "--on-failure", "restart=1", **environment), "--output")


def test_a_signal_to_the_script_ends_the_job_for_good(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time\nprint('started', flush=True)\ntime.sleep(100)\n")
    with subprocess.Popen(
        [LOCAL, "-n", "1", "--on-failure", "restart=3", "--output", str(tmp_path)],
        env=environment_with({"MPIRUN": str(BIN / "mpirun"), "PROGRAM": str(program)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            assert job.stdout is not None
            assert job.stdout.readline() == "started\n"
            job.send_signal(signal.SIGTERM)
            output, errors = job.communicate(timeout=30)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert "restarting" not in output + errors


# What virtual_hosts.sh runs beside the hosts, as on a login node, for mpirun. When the fifth step has been logged, the
# process that holds the second host is killed, and the host with all its processes is gone.
LOGIN_NODE = """\
#!/bin/sh
[ "$1" != --version ] || exec "$TEST_MPIRUN" --version
export MPIRUN="$TEST_MPIRUN" PYTHON="$TEST_PYTHON"
(
    until grep -qs '"step": 5,' "$TEST_FOLDER/run/metrics.jsonl"; do sleep 0.1; done
    kill -KILL "$(cat "$VIRTUAL_HOSTS_FOLDER/host2")"
) &
exec "$TEST_HOSTS" "$TEST_FOLDER/hosts" --interface eth0 --rsh "$TEST_SSH" --on-failure restart=1 -- {arguments}
"""


@pytest.mark.root
@pytest.mark.parametrize("mpi", ["own", "openmpi"])
def test_a_job_goes_on_without_the_host_that_is_gone(tmp_path: Path, mpi: str) -> None:
    require_virtual_hosts()
    programs = BIN if mpi == "own" else open_mpi()
    name = str(uuid.uuid4())
    folder = tmp_path / "run"
    (tmp_path / "hosts").write_text("host1\nhost2\n")
    flags = [*TRAIN[2:], "--model", "tests.parts:slow_model", "--log-every", "1", "--timeout-seconds", "30"]
    login = tmp_path / "login"
    login.write_text(LOGIN_NODE.format(arguments=" ".join([*flags, "--output", str(folder)])))
    login.chmod(0o755)
    environment = environment_with(
        {
            "MPIRUN": str(login),
            "TEST_MPIRUN": str(programs / "mpirun"),
            "TEST_PYTHON": str(programs / "python"),
            "TEST_HOSTS": str(HOSTS),
            "TEST_FOLDER": str(tmp_path),
            "TEST_SSH": str(ROOT / "launch" / "virtual_hosts_ssh.sh"),
            "TEST_STEP_SECONDS": "0.3",
            "VIRTUAL_HOSTS_TEST": name,
        }
    )
    done = subprocess.run(
        [SCRIPT, "--", "true"],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    said = [line for line in done.stderr.splitlines() if line.startswith("mpirun_hosts.sh: ")]
    if mpi == "openmpi" and "lost a daemon" in said[0]:
        # Where no rank fails before mpirun has noticed, which would otherwise pass for a success.
        assert said.pop(0) == "mpirun_hosts.sh: mpirun lost a daemon, and ended the ranks with status 0"
    assert len(said) == 2
    assert f"; restarting from {folder}/checkpoints/step-0000000" in said[0]
    assert said[1] == "mpirun_hosts.sh: host2 does not answer; going on without it"
    assert "sums will round differently: ranks 2 -> 1" in done.stdout
    summary = summary_of(folder)
    assert (summary["steps"], summary["world_size"], summary["global_batch_size"]) == (12, 1, 32)
    assert newest_step(folder) == 12
    deadline_seconds = time.monotonic() + 15
    while processes_left(name) and time.monotonic() < deadline_seconds:
        time.sleep(0.1)
    assert processes_left(name) == []
