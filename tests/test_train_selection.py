"""Early stopping, averages of weights, the plateau and what is tried before training, as users start them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from allreduce_sgd.config import config_from
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.gradients.replicate import parameters_sha256
from allreduce_sgd.models.losses import build_loss
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.optim.plateau import Plateau
from allreduce_sgd.optim.schedule import build_schedule
from allreduce_sgd.train import main
from tests.parts import slow_model
from tests.test_train import lines_of, summary_of, train_all

NORMALISED = ["--model", "tests.parts:slow_model", "--batch-size", "16", "--threads", "1"]
VALIDATED = ["--validation-fraction", "0.25"]
EARLY = [*VALIDATED, "--hidden", "16", "--evaluate-every", "2", "--patience", "2", "--min-delta", "10"]
# Each is resumed from step 11. An epoch has 23 steps on 3 ranks with a quarter held out, 34 of 2 workers.
RESUMED = {
    "ema": [*VALIDATED, "--ema", "0.8", "--patience", "9", "--lr-schedule", "plateau", "--plateau-patience", "0"],
    "local": [*VALIDATED, "--ema", "0.9", "--strategy", "local", "--period", "4", "--lr-schedule", "plateau"],
    "swa": ["--strategy", "local", "--period", "4", "--swa", "0.5", "--global-batch-size", "96", "--lr", "0.3"],
    "server-sync": [*VALIDATED, "--ema", "0.8", "--patience", "9", "--strategy", "server-sync"],
}
RESUMED["ema"] += ["--lr", "0.8"]
RESUMED["swa"] += ["--lr-schedule", "plateau", "--plateau-patience", "0"]
STOPPED = {
    "sync": EARLY,
    "server-async": [*EARLY, "--strategy", "server-async", "--momentum", "0"],
    "hogwild": [*EARLY, "--strategy", "hogwild", "--momentum", "0", "--ema", "0.5"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs on 3 ranks: of RESUMED each as a whole and resumed, of STOPPED each until it stopped."""
    folder = tmp_path_factory.mktemp("selection")
    runs = []
    for name, flags in RESUMED.items():
        end = ["--batch-size", "16"] if "--global-batch-size" not in flags else []
        model = [flag for flag in NORMALISED if flag not in ("--batch-size", "16")]
        course = ["--steps", "33", "--evaluate-every", "4", "--checkpoint-every", "11", "--log-every", "5"]
        runs.append([*model, *end, *course, *flags, "--output", str(folder / name)])
        saved = folder / name / "checkpoints" / "step-00000011"
        runs.append(["--resume", str(saved), "--output", str(folder / f"{name} resumed")])
    runs += [[*flags, "--output", str(folder / name)] for name, flags in STOPPED.items()]
    finder = ["--find-lr", "--hidden", "16", "--steps", "12"]
    runs += [
        [*finder, "--output", str(folder / "finder")],
        [*finder, "--strategy", "server-async", "--momentum", "0", "--output", str(folder / "finder server-async")],
        ["--steps", "2", "--check-gradients", "3", "--hidden", "16", "--output", str(folder / "checked")],
    ]
    train_all(3, runs)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_undisturbed_bit_for_bit(trained: Path, name: str) -> None:
    whole, resumed = summary_of(trained / name), summary_of(trained / f"{name} resumed")
    for key in ("parameters_sha256", "steps", "test_loss", "validation_loss", "best_step", "final_model"):
        assert resumed[key] == whole[key], key
    rates = [
        {line["step"]: line["learning_rate"] for line in lines_of(folder) if line["event"] == "train"}
        for folder in (trained / name, trained / f"{name} resumed")
    ]
    assert rates[1] == {step: rate for step, rate in rates[0].items() if step > 11}


@pytest.mark.parametrize("name", ["ema", "server-sync", *STOPPED])
def test_the_final_model_is_the_best_one_and_kept(trained: Path, name: str) -> None:
    summary = summary_of(trained / name)
    evaluations = [line for line in lines_of(trained / name) if line["event"] == "evaluation"]
    best = min(evaluations, key=lambda line: line["validation_loss"])
    kept = torch.load(trained / name / "best.pt", weights_only=True)
    assert kept["step"] == summary["best_step"] == best["step"]
    for key in ("test_loss", "test_accuracy", "validation_loss", "validation_accuracy"):
        assert summary[key] == best[key] == kept[key]
    if name in STOPPED:
        assert [line["step"] for line in evaluations] == [2, 4, 6]
        assert (summary["stopped_early"], summary["steps"]) == (True, 6)
        return
    model = slow_model((1, 8, 8), 10)
    model.load_state_dict(kept["model"])
    assert parameters_sha256(model) == summary["parameters_sha256"]
    # What is told of it is what a plain evaluation gives, buffers of batch normalisation included.
    test = load_dataset(DataOptions(validation_fraction=0.25), 0).test
    inputs, targets = test.batch(torch.arange(len(test)))
    with torch.no_grad():
        loss = build_loss(None, "mlp", 10)(model.eval()(inputs), targets)
    assert float(loss) == pytest.approx(summary["test_loss"], rel=1e-5)


def test_averages_are_what_is_kept_and_told(trained: Path) -> None:
    assert summary_of(trained / "ema")["final_model"] == "exponential moving average, decay 0.8"
    swa = summary_of(trained / "swa")
    # Epochs end at steps 15 and 30, of which the first comes before half the run.
    assert swa["final_model"] == "average of 1 epoch"
    assert (swa["best_step"], swa["validation_loss"]) == (None, None)
    averaged = torch.load(trained / "swa" / "averaged.pt", weights_only=True)
    model = slow_model((1, 8, 8), 10)
    model.load_state_dict(averaged["model"])
    assert parameters_sha256(model) == swa["parameters_sha256"]
    # The statistics are those of all training samples: without dropout they would be exactly these.
    train = load_dataset(DataOptions(), 0).train
    inputs, _ = train.batch(torch.arange(len(train)))
    layers = model.get_submodule("body")
    assert isinstance(layers, nn.Sequential)
    with torch.no_grad():
        before = layers[1](layers[0](inputs))
    torch.testing.assert_close(layers[2].running_mean, before.mean(0), rtol=1e-3, atol=1e-4)
    saved = torch.load(trained / "swa" / "checkpoints" / "step-00000033" / "shared.pt", weights_only=True)
    torch.testing.assert_close(model.get_parameter("body.1.weight"), saved["final_model"]["average"]["body.1.weight"])
    # The training itself has gone on since, without the average.
    assert not torch.equal(saved["model"]["body.1.weight"], saved["final_model"]["average"]["body.1.weight"])


def test_plateau_follows_the_losses_that_were_told(trained: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = build_schedule(OptimizerOptions(lr=0.8, lr_schedule="plateau"), optimizer, 33)
    plateau = Plateau(schedule, 0.1, 0)
    for line in lines_of(trained / "ema"):
        if line["event"] == "evaluation":
            plateau.look(line["validation_loss"])
        else:
            assert line["learning_rate"] == optimizer.param_groups[0]["lr"]
    assert plateau.factor < 1


@pytest.mark.parametrize("name", ["finder", "finder server-async"])
def test_the_finder_writes_its_sweep_and_trains_nothing(trained: Path, name: str) -> None:
    folder = trained / name
    sweep = json.loads((folder / "lr-finder.json").read_text())
    assert sweep["rates"][0] == 1e-6
    assert len(sweep["rates"]) == len(sweep["losses"]) == len(sweep["smoothed_losses"]) <= 12
    # The first rates are too small to change anything, the last too large for anything else.
    assert sweep["losses"][0] == pytest.approx(2.5, abs=0.5)
    assert (folder / "lr-finder.png").exists()
    assert (folder / "metrics.jsonl").read_text() == ""
    assert not (folder / "summary.json").exists()
    assert not (folder / "checkpoints").exists()


def refused(capfd: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main([*flags, "--threads", "1"]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    return told


def test_a_wrong_gradient_ends_the_run_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = refused(capfd, "--model", "tests.parts:wrong_gradient_model", "--check-gradients", "6", "--steps", "3")
    assert "--check-gradients 6: the gradient of bias[" in told
    assert "allowed is 0.0001" in told


@pytest.mark.parametrize(
    ("swa", "steps", "told"),
    [
        ("0.9", "60", "the last ends at step 45 of 60; choose at most 0.75"),
        ("0", "44", "the run has 44 steps, less than one of 45 steps"),
    ],
)
def test_swa_needs_an_epoch_to_end(capfd: pytest.CaptureFixture[str], swa: str, steps: str, told: str) -> None:
    assert told in refused(capfd, "--swa", swa, "--steps", steps)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"patience": 3}, "--patience 3: it goes by the validation loss; .* --validation-fraction"),
        ({"min-delta": 0.1}, "--min-delta 0.1: it belongs to --patience, which is not set"),
        ({"ema": 0.9, "swa": 0.5}, "--ema 0.9: --swa averages the model already; take one of the two"),
        ({"plateau-patience": 3}, "--plateau-patience 3: --lr-schedule constant has no use for it, only plateau"),
        ({"lr-schedule": "plateau", "lr-decay": 1.0}, "--lr-decay 1: --lr-schedule plateau needs a factor below 1"),
        ({"find-lr": True, "resume": "x"}, "--find-lr: .* leave out --resume"),
        ({"find-lr": True, "steps": 1}, "--steps 1: --find-lr needs at least 2"),
    ],
)
def test_what_makes_no_sense_is_one_line(values: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_from(values)
