import json
from pathlib import Path

import pytest
import torch

from allreduce_sgd.comm.base import Traffic
from benchmarks.contenders import Contender, Turn, reference
from benchmarks.step_time import main, summarise
from benchmarks.workloads import WORKLOADS, Workload
from tests.launching import mpirun

SMALL = Workload(4, (6,), (5,))


def turn(seconds: float, exposed_seconds: float | None = 0.0) -> Turn:
    return Turn(seconds, 0.2 * seconds, 0.5 * seconds, 0.1 * seconds, exposed_seconds, None)


def test_a_round_lasts_as_long_as_its_slowest_rank() -> None:
    rows = summarise("w", 2, {("no_communication", ""): [[turn(1), turn(2)], [turn(4), turn(3)], [turn(9), turn(1)]]})
    assert rows[0]["median_seconds"] == 4
    assert (rows[0]["minimum_seconds"], rows[0]["maximum_seconds"]) == (2, 9)
    assert rows[0]["forward_seconds"] == pytest.approx(0.2 * 3.5)
    assert rows[0]["ratio"] == 1


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that slows down by a factor of four changes every time, and no ratio."""
    bare = [[turn(1.0)], [turn(2.0)], [turn(4.0)]]
    ours = [[turn(1.5)], [turn(3.0)], [turn(6.0)]]
    rows = summarise("w", 1, {("no_communication", ""): bare, ("allreduce_sgd", ""): ours})
    assert rows[1]["ratio"] == 1.5


def test_the_fastest_setting_counts_and_waiting_that_is_not_told_is_a_difference() -> None:
    rows = summarise(
        "w",
        1,
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


def test_the_serial_step_passes_its_own_check_and_a_wrong_gradient_does_not() -> None:
    module = SMALL.build()
    contender = Contender("alone", "", module, module, Traffic())
    truth = reference(SMALL, ranks=1)
    contender.turn(SMALL.batch(0), 1)
    assert contender.check(truth) is None
    contender.turn(SMALL.batch(0), 1)
    assert "off by" in str(contender.check(truth))
    contender.reset()
    contender.turn(SMALL.batch(1), 1)
    assert "the gradient of parameter 0 is off by" in str(contender.check(truth))


def test_a_missed_update_is_noticed() -> None:
    module = SMALL.build()
    contender = Contender("alone", "", module, module, Traffic())
    truth = reference(SMALL, ranks=1)
    contender.turn(SMALL.batch(0), 1)
    with torch.no_grad():
        list(module.parameters())[2].copy_(truth.start[2])
    assert "parameter 2 is off by" in str(contender.check(truth))


def test_bad_arguments_are_one_line_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["--workloads", "nothing"], ["--steps", "0"], ["--json", str(tmp_path / "no" / "file.json")]):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert arguments[0] in captured.err


def test_two_ranks_measure_and_check_all_contenders(tmp_path: Path) -> None:
    file = tmp_path / "step_time.json"
    flags = f"--workloads mlp512-b16 --rounds 2 --steps 2 --warmup 1 --json {file}"
    run = mpirun(2, ["-m", "benchmarks.step_time", *flags.split()])
    assert run.status == 0, run.errors
    assert "mlp512-b16" in run.output
    record = json.loads(file.read_text())
    assert set(record) == {"benchmark", "command", "commit", "machine", "versions", "rows"}
    rows = {row["contender"]: row for row in record["rows"]}
    assert set(rows) == {"alone", "no_communication", "allreduce_sgd", "torch_ddp_gloo"}
    assert all(row["median_seconds"] > 0 and row["ranks"] == 2 for row in rows.values())
    # The ring on two ranks sends every gradient once: 2(P-1)/P n bytes.
    parameters = sum(parameter.numel() for parameter in WORKLOADS["mlp512-b16"].build().parameters())
    assert rows["allreduce_sgd"]["sent_bytes"] == 4 * parameters
