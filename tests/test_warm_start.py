"""Ranks that fork from a process with torch are like ranks that were started: what they are given, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import launching, warm_start

# What a program can tell of how it was started.
TELL = """
import json, os, sys
given = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "ASKED_FOR")}
ours = [name for name in sys.modules if name.split(".")[0] in ("allreduce_sgd", "mpi4py")]
print(json.dumps([__name__, sys.argv, os.getcwd(), given, sys.stdin.read(), ours]))
"""
MPI = """
import sys
from mpi4py import MPI
world = MPI.COMM_WORLD
print(f"{world.allreduce(world.rank)} of {world.size}\\n", end="")
sys.exit(5 if world.rank == 1 else 0)
"""


def test_a_fork_is_given_what_a_started_python_is_given(tmp_path: Path) -> None:
    (started, forked) = (
        run(["-c", TELL, "--flag", "value"], environment={"ASKED_FOR": "this"}, cwd=tmp_path)
        for run in (launching.python, warm_start.python)
    )
    assert (forked.status, forked.output, forked.errors) == (started.status, started.output, started.errors)
    assert json.loads(forked.output)[5] == []


def test_modules_are_run_as_the_program(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TELL)
    done = warm_start.python(["-m", "told", "value"], environment={"ASKED_FOR": "this"}, cwd=tmp_path)
    assert (done.status, done.errors) == (0, "")
    name, arguments, folder, *_ = json.loads(done.output)
    assert (name, arguments, folder) == ("__main__", [str(tmp_path / "told.py"), "value"], str(tmp_path))


def test_ranks_have_one_world_and_the_launcher_their_status() -> None:
    done = warm_start.mpirun(3, ["-c", MPI])
    assert done.output == "3 of 3\n" * 3
    assert done.status == 5


@pytest.mark.parametrize(
    ("program", "status", "errors"),
    [
        ("raise SystemExit", 0, []),
        ("import sys; sys.exit('no')", 1, ["no"]),
        ("1 / 0", 1, ["Traceback", "ZeroDivisionError: division by zero"]),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, []),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, []),
        ("import atexit, os; atexit.register(os.write, 2, b'last'); print('first')", 0, ["last"]),
    ],
)
def test_it_ends_as_its_program_does(program: str, status: int, errors: list[str]) -> None:
    done = warm_start.python(["-c", program])
    assert done.status == status
    assert all(part in done.errors for part in errors)
    assert bool(done.errors) == bool(errors)


def test_one_rank_that_aborts_ends_all() -> None:
    program = "from mpi4py import MPI; world = MPI.COMM_WORLD; world.Abort(3) if world.rank else world.recv(source=1)"
    assert warm_start.mpirun(3, ["-c", program], timeout_seconds=60).status == 3


def test_a_client_that_is_killed_takes_its_fork_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    program = f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(f'{{os.getpid()}}.'); time.sleep(600)"
    client = launching.start(None, ["-c", program], program=warm_start.program())
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text().endswith(".")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fork = psutil.Process(int(file.read_text()[:-1]))
    assert fork.pid != client.pid
    client.kill()
    fork.wait(60)
    assert launching.finish(client, time.monotonic(), 60).status == -signal.SIGKILL


def test_the_server_ends_with_the_process_that_started_it() -> None:
    program = "import tests.warm_start as warm; warm.python(['-c', '']); print(warm._server().pid)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=launching.ROOT,
        env=launching.environment_with({}),
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    assert not os.path.exists(f"/proc/{int(done.stdout)}")
