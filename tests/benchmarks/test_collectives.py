import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.collective_rows import Setting, make_rows
from benchmarks.collectives import main
from benchmarks.rounds import Contender, Turns, Wait
from tests.launch.requirements import require_root
from tests.launching import ROOT, find_mpirun
from tests.warm_start import mpirun

MIB = 1 << 20

# Gloo as a peer that adds one to the right result.
BROKEN_PEER = """
import sys, torch.distributed as dist
from benchmarks.collectives import main
right = dist.all_reduce
def wrong(tensor, *arguments, **options):
    right(tensor, *arguments, **options)
    if tensor.numel() == 2048:
        tensor[:3] += 1
dist.all_reduce = wrong
sys.exit(main(sys.argv[1:]))
"""

STAND_IN_FOR_HOROVOD = """
import torch
from mpi4py import MPI
Sum = object()
def init(): pass
def shutdown(): pass
def size(): return MPI.COMM_WORLD.Get_size()
def allreduce_(tensor, op, name):
    assert op is Sum
    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, tensor.numpy())
    return tensor
"""


def contender(name: str, ours: bool = False, asynchronous: bool = False, variant: str = "in_place") -> Contender:
    buffer = torch.zeros(1)
    return Contender(name, variant, ours, buffer, lambda: buffer, slice(0, 1), asynchronous)


def setting(ranks: int = 2, hosts: int = 1, size_bytes: int = 8 * MIB) -> Setting:
    return Setting("all_reduce", "float32", size_bytes // 4, size_bytes, ranks, hosts, 1)


def test_bandwidths_are_those_of_nccl_tests() -> None:
    (row,) = make_rows(setting(ranks=4), [(contender("mpi"), Turns([0.3, 0.1, 0.2]), None)], 0.1, [])
    assert (row["median_seconds"], row["minimum_seconds"], row["maximum_seconds"]) == (0.2, 0.1, 0.3)
    assert row["algbw_gigabytes_per_second"] == pytest.approx(8 * MIB / 0.2 / 1e9)
    assert row["busbw_gigabytes_per_second"] == pytest.approx(1.5 * 8 * MIB / 0.2 / 1e9)
    assert (row["floor_seconds"], row["ratio_to_floor"]) == (0.1, pytest.approx(2))
    assert row["busbw_to_raw_tcp"] is None
    assert not row["bypass"]


def test_the_asynchronous_call_stands_beside_the_synchronous_one() -> None:
    results: list[tuple[Contender, Turns, Wait | None]] = [
        (contender("ring", True), Turns([0.1], 1), Wait(0.05, 0.01)),
        (contender("ring", True, True), Turns([0.3], 2), Wait(0.05, 0.02)),
        (contender("ring", True, False, "shared_result"), Turns([0.2]), None),
    ]
    first, second = make_rows(setting(), results, None, [])
    assert (first["median_seconds"], first["asynchronous_seconds"], first["wrong"]) == (0.1, 0.3, 3)
    assert first["cpu_fraction_waiting"] == pytest.approx(0.2)
    assert first["asynchronous_cpu_fraction_waiting"] == pytest.approx(0.4)
    assert (second["variant"], second["asynchronous_seconds"], second["wrong"]) == ("shared_result", None, 0)


def test_more_than_the_links_carry_is_a_bypass_unless_it_fits_a_burst() -> None:
    """Two hosts of two ranks: n bytes pass each link, 1.5 n count as bus bandwidth."""
    rates = [100e6, 90e6, 95e6]

    def row(size_bytes: int, seconds: float) -> dict[str, Any]:
        measured = [(contender("mpi"), Turns([seconds]), None)]
        return make_rows(setting(4, 2, size_bytes), measured, None, rates)[0]

    at_limit = row(10_000_000, 0.1)
    assert at_limit["raw_tcp_gigabytes_per_second"] == pytest.approx(0.095)
    assert at_limit["busbw_to_raw_tcp"] == pytest.approx(100 / 95)
    assert not at_limit["bypass"]
    assert row(10_000_000, 0.09)["bypass"]
    assert not row(1_000_000, 0.001)["bypass"]


@pytest.mark.parametrize(
    "arguments",
    [
        "--sizes 4X",
        "--sizes 8M:4K",
        "--sizes 4K,6",
        "--peers nothing",
        "--algorithms nothing",
        "--ops all_to_all",
        "--dtype float8",
        "--rounds 0",
        "--plot plot.txt",
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert arguments.split()[0] in captured.err


def test_one_rank_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "mpirun -np 2" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_noticed_before_measuring(tmp_path: Path) -> None:
    run = mpirun(2, ["-m", "benchmarks.collectives", "--json", str(tmp_path / "no" / "file.json")])
    assert run.status == 2
    assert run.errors.count("--json") == 1


def test_two_ranks_measure_and_check_all_contenders(tmp_path: Path) -> None:
    record_file, plot_file = tmp_path / "collectives.json", tmp_path / "collectives.png"
    flags = f"--sizes 4K:8K,1M --rounds 2 --warmup 1 --private --json {record_file} --plot {plot_file}"
    run = mpirun(2, ["-m", "benchmarks.collectives", *flags.split()])
    assert run.status == 0, run.errors
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    record = json.loads(record_file.read_text())
    assert set(record) == {"benchmark", "command", "commit", "machine", "versions", "rows"}
    rows = record["rows"]
    assert {row["bytes"] for row in rows} == {4096, 8192, MIB}
    assert {(row["contender"], row["variant"], row["ours"]) for row in rows if row["contender"] != "horovod"} == {
        ("mpi", "in_place", False),
        ("gloo", "in_place", False),
        ("auto", "in_place", True),
        ("auto", "shared_result", True),
        ("auto, private buffer", "in_place", True),
    }
    for row in rows:
        assert (row["op"], row["dtype"], row["ranks"], row["hosts"], row["wrong"]) == ("all_reduce", "float32", 2, 1, 0)
        assert row["count"] * 4 == row["bytes"]
        assert row["rounds"] == 2
        assert row["busbw_gigabytes_per_second"] == pytest.approx(row["bytes"] / row["median_seconds"] / 1e9)
        assert row["ratio_to_floor"] == pytest.approx(row["median_seconds"] / row["floor_seconds"])
        assert (row["asynchronous_seconds"] is not None) == row["ours"]
        # Idleness is measured at one size.
        assert (row["cpu_fraction_waiting"] is not None) == (row["bytes"] == MIB)
    late = [row["wait_seconds"] for row in rows if row["bytes"] == MIB]
    assert all(0.04 < seconds < 5 for seconds in late)
    for words in ("busbw", "#wrong", "memory floor", "fastest peer ÷ ours", "CPU time burnt"):
        assert words in run.output


def test_three_ranks_check_every_operation_in_sizes_that_do_not_divide(tmp_path: Path) -> None:
    file = tmp_path / "collectives.json"
    flags = "--sizes 8,6008 --dtype float64 --rounds 1 --warmup 1 --peers mpi,gloo --algorithms ring"
    operations = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
    arguments = [*flags.split(), "--ops", ",".join(operations), "--json", str(file)]
    run = mpirun(3, ["-m", "benchmarks.collectives", *arguments])
    assert run.status == 0, run.errors
    rows = json.loads(file.read_text())["rows"]
    assert all(row["wrong"] == 0 for row in rows)
    counts = {operation: {row["count"] for row in rows if row["op"] == operation} for operation in operations}
    # One element is no third for each of three ranks; 751 are rounded down to a multiple of three.
    assert counts == {"all_reduce": {1, 751}, "reduce_scatter": {750}, "all_gather": {750}, "broadcast": {1, 751}}
    for operation in operations:
        assert {row["contender"] for row in rows if row["op"] == operation} == {"mpi", "gloo", "ring"}


def test_a_wrong_result_is_counted_and_ends_in_status_1(tmp_path: Path) -> None:
    file = tmp_path / "collectives.json"
    flags = f"--sizes 4K,8K --rounds 3 --warmup 1 --peers gloo --json {file}"
    run = mpirun(2, ["-c", BROKEN_PEER, *flags.split()])
    assert run.status == 1, run.errors
    rows = json.loads(file.read_text())["rows"]
    # Three elements on two ranks in three rounds.
    assert {row["contender"]: row["wrong"] for row in rows if row["bytes"] == 8192} == {"gloo": 18, "auto": 0}
    assert all(row["wrong"] == 0 for row in rows if row["bytes"] == 4096)


def test_horovod_takes_part_where_it_is_importable(tmp_path: Path) -> None:
    package = tmp_path / "modules" / "horovod"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "torch.py").write_text(STAND_IN_FOR_HOROVOD)
    file = tmp_path / "collectives.json"
    flags = f"--sizes 4K --rounds 2 --warmup 1 --peers horovod --json {file}"
    path = {"PYTHONPATH": f"{ROOT}:{package.parent}"}
    run = mpirun(2, ["-m", "benchmarks.collectives", *flags.split()], environment=path)
    assert run.status == 0, run.errors
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["horovod"]["wrong"] == 0
    assert not rows["horovod"]["ours"]


def test_what_cannot_run_here_is_left_out_in_a_line() -> None:
    flags = "--sizes 4K --rounds 1 --warmup 1 --peers nccl"
    run = mpirun(2, ["-m", "benchmarks.collectives", *flags.split()])
    assert run.status == 0, run.errors
    assert run.output.splitlines()[0] == "nccl: takes tensors on a GPU only, left out"


@pytest.mark.root
def test_between_hosts_the_floor_is_raw_tcp_over_the_same_links(tmp_path: Path) -> None:
    require_root()
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("no ip and tc: install iproute2")
    file = tmp_path / "collectives.json"
    flags = f"--sizes 8M --rounds 3 --warmup 1 --peers none --algorithms ring --json {file}"
    hosts = [str(ROOT / "launch" / "virtual_hosts.sh"), "--rate", "400mbit", "--"]
    run = subprocess.run(
        [*hosts, sys.executable, "-m", "benchmarks.collectives", *flags.split()],
        env={**os.environ, "MPIRUN": find_mpirun(), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(file.read_text())["rows"]
    for row in rows:
        assert (row["hosts"], row["wrong"], row["bypass"]) == (2, 0, False)
        # 400 Mbit/s are 0.05 GB/s, of which headers take 4 to 6 %.
        assert 0.03 < row["raw_tcp_gigabytes_per_second"] < 0.052
        assert row["busbw_to_raw_tcp"] < 1.1
        assert row["floor_seconds"] == pytest.approx(8 * MIB / row["raw_tcp_gigabytes_per_second"] / 1e9)
    assert "link rate ÷ raw TCP" in run.stdout
