"""The main job as users start it: results, equality with a plain loop, and independence of the number of ranks."""

import json
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from allreduce_sgd.checkpoint import find
from allreduce_sgd.command_line import parse
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.sampling import EpochSampler
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.models.options import ModelOptions
from allreduce_sgd.models.registry import build_model
from tests.warm_start import mpirun, python

TRAIN = ["-m", "allreduce_sgd.train"]

SUMMARY_KEYS = (
    "world_size workers servers strategy backend algorithm steps epochs samples train_loss test_loss test_accuracy "
    "target_accuracy reached_target train_seconds wall_seconds samples_per_second communication_bytes "
    "communication_seconds exposed_communication_seconds seed parameters_sha256"
).split()


def train(ranks: int | None, folder: Path, *flags: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Train, and return the summary."""
    arguments = [*TRAIN, "--output", str(folder), *flags]
    done = (
        python(arguments, environment=environment)
        if ranks is None
        else mpirun(ranks, arguments, environment=environment)
    )
    assert done.status == 0, f"{done.output}\n{done.errors}"
    assert done.errors == ""
    return summary_of(folder)


def train_all(ranks: int, runs: Sequence[Sequence[str]]) -> None:
    """Train with each of these flags, one after another in the same processes."""
    done = mpirun(ranks, ["-m", "tests.several_trainings", json.dumps(runs)], timeout_seconds=400)
    assert done.status == 0, f"{done.output}\n{done.errors}"


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_default_job_writes_everything_and_can_be_run_again_from_its_configuration(tmp_path: Path) -> None:
    summary = train(2, tmp_path / "run")
    assert set(SUMMARY_KEYS) <= set(summary)
    assert summary["test_accuracy"] >= 0.96
    assert (summary["world_size"], summary["workers"], summary["servers"]) == (2, 2, 0)
    assert (summary["strategy"], summary["backend"], summary["algorithm"]) == ("sync", "mpi", "shared-memory")
    assert summary["epochs"] == 20
    assert summary["samples"] == 20 * 1438
    assert 0 < summary["exposed_communication_seconds"] < summary["train_seconds"] <= summary["wall_seconds"]
    lines = lines_of(tmp_path / "run")
    assert {line["event"] for line in lines} == {"train", "evaluation"}
    sent = [line["communication_bytes"] for line in lines if line["event"] == "train"]
    assert 0 < sent[0] < sent[1] < sent[-1] <= summary["communication_bytes"]
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    assert [line["epoch"] for line in evaluations] == list(range(1, 21))
    assert evaluations[-1]["test_accuracy"] == summary["test_accuracy"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{summary['steps']:08d}"
    config, _ = parse(["--config", str(tmp_path / "run" / "config.toml")])
    assert config.optimizer.optimizer == "sgd"
    again = train(2, tmp_path / "again", "--config", str(tmp_path / "run" / "config.toml"))
    assert again["parameters_sha256"] == summary["parameters_sha256"]


def plain_loop(steps: int, batch: int) -> str:
    """Serial training as anyone would write it, over the same sample order."""
    torch.set_num_threads(1)
    dataset = load_dataset(DataOptions(), seed=3)
    torch.manual_seed(3)
    model = build_model(ModelOptions(), dataset.input_shape, dataset.classes, seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_function = nn.CrossEntropyLoss()
    sampler = EpochSampler(len(dataset.train), batch, seed=3)
    for step in range(steps):
        epoch, position = divmod(step, sampler.steps_per_epoch)
        order = sampler.permutation(epoch)
        inputs, targets = dataset.train.batch(order[position * batch : (position + 1) * batch])
        optimizer.zero_grad()
        loss_function(model(inputs), targets).backward()
        optimizer.step()
    return parameters_sha256(model)


@pytest.mark.parametrize("ranks", [None, 1])
@pytest.mark.parametrize("strategy", ["sync", "local"])
def test_one_rank_equals_a_plain_serial_loop_bit_for_bit(tmp_path: Path, ranks: int | None, strategy: str) -> None:
    flags = ["--steps", "60", "--batch-size", "50", "--seed", "3", "--strategy", strategy]
    assert train(ranks, tmp_path / "run", *flags)["parameters_sha256"] == plain_loop(60, 50)


def test_the_number_of_ranks_does_not_change_the_training(tmp_path: Path) -> None:
    flags = ["--global-batch-size", "60", "--steps", "20", "--no-shard-optimizer"]
    summaries = {ranks: train(ranks, tmp_path / str(ranks), *flags) for ranks in (1, 2, 3, 4)}
    assert len({summary["samples"] for summary in summaries.values()}) == 1
    parameter_bytes = 4 * (64 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10)
    for ranks, summary in summaries.items():
        assert summary["test_loss"] == pytest.approx(summaries[1]["test_loss"], abs=1e-4)
        assert summary["train_loss"] == pytest.approx(summaries[1]["train_loss"], abs=1e-4)
        least = 2 * (ranks - 1) / ranks * parameter_bytes * summary["steps"]
        # A little more: the figures of each logged step are summed too.
        assert least <= summary["communication_bytes"] <= 1.01 * least
    # Where the ranks have one memory for the parameters, nothing is gathered after the update.
    sharded = train(3, tmp_path / "sharded", *flags[:-1])
    assert sharded["parameters_sha256"] == summaries[3]["parameters_sha256"]
    assert 0.49 < sharded["communication_bytes"] / summaries[3]["communication_bytes"] < 0.51


AGREEING = [
    ["--strategy", "local", "--period", "5"],
    ["--backend", "gloo"],
    ["--accumulate", "2", "--optimizer", "adamw", "--lr-schedule", "cosine", "--warmup-steps", "3"],
    ["--precision", "bf16", "--clip-norm", "1"],
    ["--model", "cnn", "--bucket-mb", "0.05", "--first-bucket-mb", "0.01"],
    ["--model", "resnet20", "--batch-size", "8"],
    ["--dataset", "tests.parts:course_samples", "--model", "linear", "--batch-size", "8", "--lr", "0.02"],
    # With a line search, for without one it leaves every basin on some machines' rounding.
    ["--optimizer", "lbfgs", "--lr", "1", "--line-search", "strong-wolfe", "--max-iterations", "4"],
]


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each of AGREEING, by its place there, on 3 ranks."""
    folder = tmp_path_factory.mktemp("agreeing")
    train_all(
        3, [["--steps", "12", *flags, "--output", str(folder / str(place))] for place, flags in enumerate(AGREEING)]
    )
    return folder


@pytest.mark.parametrize("place", range(len(AGREEING)), ids=[" ".join(flags) for flags in AGREEING])
def test_three_ranks_agree_at_the_end(agreeing: Path, place: int) -> None:
    # The run itself compares the hash of the final parameters on all ranks, and fails where they differ.
    summary = summary_of(agreeing / str(place))
    assert len(summary["parameters_sha256"]) == 64
    first = next(line["loss"] for line in lines_of(agreeing / str(place)) if line["event"] == "train")
    assert summary["test_loss"] < 2 * first
    if "gloo" in AGREEING[place]:
        assert summary["communication_bytes"] is None


def test_uneven_data_gives_the_true_mean_on_any_ranks(tmp_path: Path) -> None:
    flags = ["--dataset", "tests.parts:course_samples", "--model", "linear", "--lr", "0.02", "--epochs", "3"]
    losses = [
        train(ranks, tmp_path / str(ranks), *flags, "--global-batch-size", "25")["test_loss"] for ranks in (1, 2, 3, 4)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    with_rounds = train(2, tmp_path / "rounds", *flags, "--global-batch-size", "25", "--accumulate", "4")
    assert with_rounds["test_loss"] == pytest.approx(losses[0], rel=1e-5)


def test_the_target_stops_all_ranks(tmp_path: Path) -> None:
    flags = ["--target-accuracy", "0.9", "--epochs", "30", "--evaluate-every", "10"]
    summary = train(2, tmp_path / "run", *flags)
    assert summary["reached_target"]
    assert summary["test_accuracy"] >= 0.9
    assert summary["steps"] % 10 == 0
    assert summary["epochs"] < 30
    missed = train(2, tmp_path / "missed", "--target-loss", "0", "--epochs", "1")
    assert not missed["reached_target"]


def test_text_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    flags = ["--dataset", f"text:{text}", "--model", "chargpt", "--steps", "6", "--batch-size", "4"]
    summary = train(2, tmp_path / "run", *flags, "--optimizer", "adamw", "--block-length", "16")
    assert 0 < summary["test_accuracy"] < 1


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(2, tmp_path / "run", "--epochs", "1", "--tensorboard")
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_help_is_printed_once_and_the_console_script_is_the_module() -> None:
    done = mpirun(3, [*TRAIN, "--help"])
    assert done.status == 0
    assert done.output.count("--global-batch-size N") == 1
    scripts = [script for script in entry_points(group="console_scripts") if script.name == "allreduce-sgd"]
    if not scripts:
        pytest.skip("the package is not installed")
    assert {script.value for script in scripts} == {"allreduce_sgd.train:run"}


@pytest.mark.parametrize(
    ("ranks", "batch", "courses"), [(None, 1, [(0.0, 1.0), (0.0, 1.0)]), (2, 2, [(0.5, 1.0), (-0.25, 1.0)])]
)
def test_golden_course_example(
    tmp_path: Path, ranks: int | None, batch: int, courses: list[tuple[float, float]]
) -> None:
    """f(x) = w.x, squared loss, step 0.5, from (0, 0), through the whole program; a seed that keeps the order."""
    kept = next(seed for seed in range(1000) if EpochSampler(4, batch, seed).permutation(0).tolist() == [0, 1, 2, 3])
    flags = ["--dataset", "tests.parts:course_pairs", "--model", "tests.parts:zero_line", "--loss", "mse"]
    flags += ["--lr", "0.5", "--momentum", "0", "--global-batch-size", str(batch), "--checkpoint-every", "1"]
    train(ranks, tmp_path / "run", *flags, "--steps", "2", "--seed", str(kept))
    for step, expected in enumerate(courses, start=1):
        saved = find(tmp_path / "run" / "checkpoints" / f"step-{step:08d}").shared()["model"]["weight"]
        assert tuple(saved[0].tolist()) == expected


@pytest.mark.timeout(600)
def test_fashion_mnist_reaches_88_percent(tmp_path: Path, real_data: Path) -> None:
    flags = ["--dataset", "fashion-mnist", "--data-dir", str(real_data / "fashion-mnist"), "--global-batch-size", "256"]
    flags += ["--lr", "0.05", "--momentum", "0.9", "--epochs", "10", "--target-accuracy", "0.88"]
    done = mpirun(2, [*TRAIN, "--output", str(tmp_path / "run"), *flags], timeout_seconds=500)
    assert done.status == 0, done.errors
    assert summary_of(tmp_path / "run")["test_accuracy"] >= 0.88
