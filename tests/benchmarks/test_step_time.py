import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from allreduce_sgd.comm.base import Traffic
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from benchmarks.contenders import Contender, Turn, bucket_parameters, reference
from benchmarks.overlap import Parts, overlap_bound
from benchmarks.step_rows import Setup, report, summarise
from benchmarks.step_time import main
from benchmarks.workloads import WORKLOADS, Workload
from tests.launch.virtual_hosts import require_virtual_hosts, run_on_virtual_hosts
from tests.warm_start import mpirun

SMALL = Workload(4, (6,), (5,))
ONE = Setup(1, 1, "sgd")
TWO = Setup(2, 1, "sgd")


def turn(seconds: float, exposed_seconds: float | None = 0.0) -> Turn:
    return Turn(seconds, 0.2 * seconds, 0.5 * seconds, 0.1 * seconds, exposed_seconds, None)


def bare(optimizer: str = "sgd") -> Contender:
    module = SMALL.build()
    return Contender("alone", "", module, module, Traffic(), optimizer)


def parameters_of(workload: str) -> int:
    return sum(parameter.numel() for parameter in WORKLOADS[workload].build().parameters())


def rows_of(file: Path) -> dict[str, dict[str, Any]]:
    record = json.loads(file.read_text())
    assert set(record) == {"benchmark", "command", "commit", "machine", "versions", "rows"}
    return {row["contender"]: row for row in record["rows"]}


class TestRows:
    def test_a_round_lasts_as_long_as_its_slowest_rank(self) -> None:
        turns = [[turn(1), turn(2)], [turn(4), turn(3)], [turn(9), turn(1)]]
        rows = summarise("w", TWO, {("no_communication", ""): turns})
        assert rows[0]["median_seconds"] == 4
        assert (rows[0]["minimum_seconds"], rows[0]["maximum_seconds"]) == (2, 9)
        assert rows[0]["forward_seconds"] == pytest.approx(0.2 * 3.5)
        assert rows[0]["ratio"] == 1
        assert (rows[0]["ranks"], rows[0]["hosts"]) == (2, 1)

    def test_ratios_are_taken_within_rounds(self) -> None:
        """A machine that slows down by a factor of four changes every time, and no ratio."""
        slowing = [[turn(1.0)], [turn(2.0)], [turn(4.0)]]
        ours = [[turn(1.5)], [turn(3.0)], [turn(6.0)]]
        parts = [Parts(seconds, (), 0.0, 0.0, (), 1.0) for seconds in (1.0, 2.0, 4.0)]
        rows = summarise("w", ONE, {("no_communication", ""): slowing, ("allreduce_sgd", ""): ours}, parts)
        assert rows[1]["ratio"] == 1.5
        assert (rows[1]["ratio_to_bound"], rows[1]["bound_seconds"]) == (1.5, 2.0)

    def test_the_fastest_setting_counts_and_waiting_that_is_not_told_is_a_difference(self) -> None:
        rows = summarise(
            "w",
            ONE,
            {
                ("no_communication", ""): [[turn(1.0)]],
                ("torch_ddp_gloo", "slow"): [[turn(3.0, None)]],
                ("torch_ddp_gloo", "fast"): [[turn(2.0, None)]],
            },
        )
        assert [row["contender"] for row in rows] == ["no_communication", "torch_ddp_gloo"]
        torch_row = rows[1]
        assert (torch_row["setting"], torch_row["median_seconds"]) == ("fast", 2.0)
        assert torch_row["settings_tried"] == {"slow": 3.0, "fast": 2.0}
        assert (torch_row["exposed_seconds"], torch_row["exposed_by"]) == (1.0, "difference")
        assert torch_row["backward_seconds"] == pytest.approx(0.5 * 2.0)
        assert "slow" in report(rows)


class TestBound:
    @pytest.mark.parametrize(
        ("parts", "expected"),
        [
            # Nothing to send: forward, backward, optimizer.
            (Parts(1.0, (), 2.0, 0.5, (), 1.0), 3.5),
            # Hidden altogether.
            (Parts(1.0, (0.5, 1.0), 2.0, 0.5, (0.5, 0.5), 1.0), 3.5),
            # The last bucket is ready with the last gradient, and stands alone.
            (Parts(1.0, (0.5, 2.0), 2.0, 0.5, (0.5, 0.25), 1.0), 3.75),
            # A long reduction keeps the next one waiting: e = 0.5 + 3 + 1.
            (Parts(1.0, (0.5, 2.0), 2.0, 0.5, (3.0, 1.0), 1.0), 6.0),
            # From 0.5 to 1.5 the link is busy, so that of the 1.5 s of computing left 1/2 is done, and ends at 2.5.
            (Parts(0.0, (0.5,), 2.0, 0.0, (1.0,), 2.0), 2.5),
            # The second is ready later for it: 0.5 + 2·1 = 2.5, and is reduced until 3.5.
            (Parts(0.0, (0.5, 1.5), 1.5, 0.0, (4.0, 1.0), 2.0), 5.5),
        ],
    )
    def test_buckets_are_reduced_in_order_while_the_rest_is_computed(self, parts: Parts, expected: float) -> None:
        assert overlap_bound(parts) == pytest.approx(expected)


class TestCheck:
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_the_serial_step_passes_its_own_check_and_a_wrong_gradient_does_not(self, optimizer: str) -> None:
        contender, truth = bare(optimizer), reference(SMALL, ranks=1)
        contender.step(SMALL.batch(0))
        assert contender.check(truth) is None
        contender.step(SMALL.batch(0))
        assert "off by" in str(contender.check(truth))
        contender.reset()
        contender.step(SMALL.batch(1))
        assert "the gradient of parameter 0 is off by" in str(contender.check(truth))

    def test_a_missed_update_is_noticed(self) -> None:
        contender, truth = bare(), reference(SMALL, ranks=1)
        before = contender.parameters[2].detach().clone()
        contender.step(SMALL.batch(0))
        with torch.no_grad():
            contender.parameters[2].copy_(before)
        assert "parameter 2 is off by" in str(contender.check(truth))

    def test_one_rank_alone_has_no_buckets(self) -> None:
        assert bucket_parameters(DistributedDataParallel(SMALL.build(), SingleCommunicator())) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workloads", "nothing"],
        ["--settings", "torch"],
        ["--compression", "zip"],
        ["--optimizer", "lion"],
        ["--steps", "0"],
        ["--json", "no/file.json"],
        ["--trace", "no/trace.json"],
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert arguments[0] in captured.err


def test_two_ranks_measure_and_check_all_contenders(tmp_path: Path) -> None:
    file = tmp_path / "step_time.json"
    flags = "--workloads mlp512-b16 --rounds 2 --steps 2 --warmup 1 --compression fp16,powersgd --bound"
    run = mpirun(2, ["-m", "benchmarks.step_time", *flags.split(), "--json", str(file)])
    assert run.status == 0, run.errors
    assert "mlp512-b16" in run.output
    rows = rows_of(file)
    assert {"alone", "no_communication", "allreduce_sgd", "torch_ddp_gloo"} < set(rows)
    assert {"allreduce_sgd_fp16", "allreduce_sgd_powersgd", "torch_ddp_gloo_fp16", "torch_ddp_gloo_powersgd"} < set(
        rows
    )
    assert all(row["median_seconds"] > 0 and row["ranks"] == 2 and row["hosts"] == 1 for row in rows.values())
    ours = rows["allreduce_sgd"]
    assert set(ours["settings_tried"]) == {"ddp", "sharded", "sharded-shared"}
    assert 0 < ours["hook_seconds_per_parameter"] < 1e-3
    assert_bound(ours)
    gradient_bytes = 4 * parameters_of("mlp512-b16")
    # Besides a flag for every parameter.
    assert 0 <= rows["allreduce_sgd_fp16"]["sent_bytes"] - gradient_bytes / 2 < 100
    assert rows["allreduce_sgd_powersgd"]["sent_bytes"] < gradient_bytes / 20


@pytest.mark.parametrize("setting", ["ddp", "sharded"])
def test_one_setting_can_be_chosen_and_another_optimizer(setting: str, tmp_path: Path) -> None:
    file = tmp_path / "step_time.json"
    flags = f"--workloads mlp512-b16 --rounds 1 --steps 2 --warmup 1 --settings {setting} --optimizer adamw"
    run = mpirun(2, ["-m", "benchmarks.step_time", *flags.split(), "--json", str(file)])
    assert run.status == 0, run.errors
    ours = rows_of(file)["allreduce_sgd"]
    assert (ours["setting"], ours["optimizer"]) == (setting, "adamw")
    assert "bound_seconds" not in ours
    # On two ranks every gradient, or half of them and half of the parameters, are sent once: 2(P-1)/P n bytes, and
    # besides the flags of used parameters, or what fills up the last chunk.
    assert 0 <= ours["sent_bytes"] - 4 * parameters_of("mlp512-b16") < 1000


@pytest.mark.root
def test_between_hosts_the_bound_is_that_of_the_link(tmp_path: Path) -> None:
    require_virtual_hosts()
    file = tmp_path / "step_time.json"
    flags = f"--workloads mlp512-b16 --settings ddp --rounds 1 --steps 2 --warmup 1 --bound --json {file}"
    run = run_on_virtual_hosts(["python", "-m", "benchmarks.step_time", *flags.split()], "--rate", "200mbit")
    assert run.returncode == 0, run.stderr
    ours = rows_of(file)["allreduce_sgd"]
    assert ours["hosts"] == 2
    assert_bound(ours)
    # Each host sends all gradients once, at no more than the link's rate; bursts are a millisecond's worth.
    assert ours["bound_seconds"] > 8 * 4 * parameters_of("mlp512-b16") / 200e6 - 0.005


def assert_bound(row: Mapping[str, Any]) -> None:
    forward, backward, optimizer = row["compute_seconds"]
    assert row["contention"] >= 1
    # One round of several: each is no shorter than its own computing.
    assert 0 < row["bound_without_contention_seconds"] <= row["bound_seconds"] * 1.0001
    assert len(row["bucket_ready_seconds"]) == len(row["bucket_reduction_seconds"]) > 0
    assert row["bucket_ready_seconds"] == sorted(row["bucket_ready_seconds"])
    assert min(forward, backward, optimizer, *row["bucket_reduction_seconds"]) > 0
