"""Half precision through the whole program: steps skipped together, counted, and resumed bit for bit."""

from pathlib import Path

from tests.test_train import TRAIN, lines_of, summary_of, train
from tests.warm_start import mpirun

OVERFLOWING = ["--model", "tests.parts:overflowing_model", "--precision", "fp16", "--log-every", "1", "--steps", "12"]


def test_an_overflow_on_one_rank_is_skipped_by_all_and_a_resumed_run_knows_it(tmp_path: Path) -> None:
    flags = ["--optimizer", "adam", "--lr-schedule", "cosine", "--clip-norm", "1", "--shard-optimizer"]
    flags += ["--checkpoint-every", "3", "--keep-checkpoints", "4"]
    # The run itself fails where the final parameters differ between ranks.
    whole = train(3, tmp_path / "whole", *OVERFLOWING, *flags)
    assert (whole["skipped_steps"], whole["steps"], whole["sharded_optimizer"]) == (1, 12, True)
    lines = [line for line in lines_of(tmp_path / "whole") if line["event"] == "train"]
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] * 8
    assert [line["loss_scale"] for line in lines] == [2.0**16] * 4 + [2.0**15] * 8
    assert lines[4]["loss"] is None
    assert lines[-1]["loss"] < lines[0]["loss"]
    # The schedule goes with the samples, so it comes to its end.
    assert lines[-1]["learning_rate"] < 1e-9
    # From before the skipped step, and from after it.
    for step in (3, 6):
        folder, source = tmp_path / f"from {step}", tmp_path / "whole" / "checkpoints" / f"step-{step:08d}"
        done = mpirun(3, [*TRAIN, "--resume", str(source), "--output", str(folder)])
        assert (done.status, done.errors) == (0, "")
        resumed = summary_of(folder)
        for key in ("parameters_sha256", "skipped_steps", "steps", "test_loss"):
            assert resumed[key] == whole[key]


def test_ranks_of_local_sgd_skip_by_themselves(tmp_path: Path) -> None:
    summary = train(2, tmp_path / "run", *OVERFLOWING, "--strategy", "local", "--period", "2", "--check-sync", "1")
    assert summary["skipped_steps"] == 1
    # Rank 0's own figures: it is rank 1 that skipped.
    assert {line["skipped_steps"] for line in lines_of(tmp_path / "run") if line["event"] == "train"} == {0}


def test_a_run_that_does_not_get_over_it_ends(tmp_path: Path) -> None:
    flags = ["--model", "tests.parts:hopeless_model", "--precision", "fp16", "--output", str(tmp_path / "run")]
    done = mpirun(2, [*TRAIN, *flags])
    assert done.status == 1
    assert "NonFiniteError: step 31: gradients hold NaN or Inf although losses are scaled by only" in done.errors
    assert done.errors.count("Traceback") == 1
