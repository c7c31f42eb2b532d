import json
from pathlib import Path

import pytest

from benchmarks.step_memory import main, rows_of

PLAIN = {
    "before_bytes": 100.0,
    "peak_bytes": 500.0,
    "page_faults_per_step": 10.0,
    "allocations_per_step": 30.0,
    "allocated_bytes_per_step": 999.0,
}


def test_what_the_model_costs_is_told_from_what_libraries_cost() -> None:
    ours = {**PLAIN, "before_bytes": 120.0, "peak_bytes": 590.0, "allocations_per_step": 31.0}
    sizes = {"gradient_bytes": 40.0}
    rows = rows_of(
        "w",
        2,
        {
            ("no_communication", ""): {**PLAIN, **sizes},
            ("allreduce_sgd", "ddp"): {**ours, **sizes, "largest_bucket_bytes": 30.0},
        },
    )
    assert rows[0]["extra_bytes"] == rows[0]["constant_bytes"] == rows[0]["fresh_bytes_per_step"] == 0
    assert rows[0]["ratio_to_allowed"] is None
    assert (rows[1]["extra_bytes"], rows[1]["constant_bytes"], rows[1]["extra_with_model_bytes"]) == (90, 20, 70)
    assert (rows[1]["allowed_bytes"], rows[1]["ratio_to_allowed"]) == (70, 1.0)
    assert (rows[1]["fresh_bytes_per_step"], rows[1]["allocations_per_step"]) == (0, 1)


@pytest.mark.parametrize("arguments", [["--workloads", "nothing"], ["--ranks", "0"], ["--json", "no/file.json"]])
def test_bad_arguments_are_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert arguments[0] in captured.err


def test_buckets_are_all_that_a_step_adds(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    assert main(["--workloads", "mlp512-b64", "--settings", "ddp", "--steps", "10", "--json", str(file)]) == 0
    rows = {row["contender"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["torch_ddp_gloo"]["allocations_per_step"] is None
    ours = rows["allreduce_sgd"]
    assert ours["gradient_bytes"] == 2_678_824
    assert ours["largest_bucket_bytes"] < ours["gradient_bytes"]
    # One bucket and the gradients, and half a megabyte for code that was not used before.
    assert ours["extra_with_model_bytes"] < ours["allowed_bytes"] + 500_000
    # In the steady state nothing is fetched anew, not a tenth of a gradient, and no tensor of any size is made.
    assert ours["fresh_bytes_per_step"] < ours["gradient_bytes"] / 10
    assert ours["allocated_bytes_per_step"] < 10_000
