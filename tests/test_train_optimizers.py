"""Every optimizer through the trainer: digits are learnt, and a run goes on from a checkpoint to the same bits."""

from pathlib import Path

import pytest

from allreduce_sgd.optim.build import optimizer_names
from tests.test_train import lines_of, summary_of, train_all

# SparseAdam wants sparse gradients, Muon matrices only.
SMALL = ["--steps", "45", "--global-batch-size", "64", "--evaluate-every", "45", "--hidden", "64"]
LEARNING = {name: SMALL for name in optimizer_names() if name not in ("sparseadam", "muon")}
LEARNING |= {
    "newton": ["--steps", "3", "--full-batch", "--model", "linear", "--damping", "0.01"],
    "lbfgs": ["--steps", "4", "--full-batch", "--line-search", "strong-wolfe", "--max-iterations", "10", *SMALL[-2:]],
    "lars": [*LEARNING["lars"], "--lr-schedule", "polynomial", "--warmup-steps", "5", "--trust", "0.01"],
    "lamb": [*LEARNING["lamb"], "--lr-scaling", "sqrt", "--lr-base-batch", "16"],
    "adadelta": [*LEARNING["adadelta"], "--rho", "0.95"],
    "asgd": [*LEARNING["asgd"], "--lr", "0.2"],
    "radam": [*LEARNING["radam"], "--lr", "0.01"],
}

RESUMED = {
    "heavy-ball": ["--lr-schedule", "inverse-time", "--lr-decay", "0.1", "--l1", "1e-4"],
    "nesterov": ["--lr-schedule", "step", "--lr-decay", "0.5", "--lr-decay-every", "3", "--l1", "1e-3"],
    "lamb": ["--lr-schedule", "exponential", "--lr-scaling", "linear", "--shard-optimizer"],
    "adam": ["--weight-decay", "0.1", "--weight-decay-form", "decoupled", "--precision", "fp16"],
}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each optimizer, by its name, in one process."""
    folder = tmp_path_factory.mktemp("learnt")
    runs = [["--optimizer", name, *flags, "--output", str(folder / name)] for name, flags in LEARNING.items()]
    train_all(1, runs)
    return folder


@pytest.mark.parametrize("name", LEARNING)
def test_digits_are_learnt(learnt: Path, name: str) -> None:
    assert summary_of(learnt / name)["test_accuracy"] > 0.75


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each, by its name, and one that went on from its fifth step, on 2 ranks."""
    folder = tmp_path_factory.mktemp("resumed")
    runs = []
    for name, flags in RESUMED.items():
        whole = [
            "--optimizer",
            name,
            *flags,
            "--steps",
            "9",
            "--checkpoint-every",
            "5",
            "--log-every",
            "1",
            *SMALL[-2:],
        ]
        runs.append([*whole, "--output", str(folder / name)])
        checkpoint = folder / name / "checkpoints" / "step-00000005"
        runs.append(["--resume", str(checkpoint), "--output", str(folder / f"{name} resumed")])
    train_all(2, runs)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_to_the_same_bits(resumed: Path, name: str) -> None:
    whole, again = summary_of(resumed / name), summary_of(resumed / f"{name} resumed")
    assert (again["steps"], again["test_loss"]) == (9, whole["test_loss"])
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    rates = [
        {line["step"]: line["learning_rate"] for line in lines_of(folder) if line["event"] == "train"}
        for folder in (resumed / name, resumed / f"{name} resumed")
    ]
    assert rates[1] == {step: rate for step, rate in rates[0].items() if step > 5}
