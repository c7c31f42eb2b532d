"""Losses, augmentation, batch normalisation and texts in whole trainings, the same on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest

from allreduce_sgd.train import main
from tests.data.spam import write_spam
from tests.test_train import summary_of, train_all

# Everything at once: a third of the labels are ignored, the others of very different frequency.
REGULARISED = (
    "--model cnn --augment crop,flip,cutout --label-smoothing 0.1 --class-weights balanced --ignore-index -100 "
    "--global-batch-size 20 --steps 5 --lr 0.02 --batch-norm"
).split()
SPAM = "--model sparse-logistic --hash-features 4096 --lr 2 --momentum 0 --batch-size 8 --epochs 6".split()
RANKS = (1, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, by number of ranks and name."""
    folder = tmp_path_factory.mktemp("regularised")
    random = np.random.default_rng(0)
    targets = np.minimum(random.integers(0, 9, 100), 3)
    inputs = random.integers(0, 256, (100, 1, 12, 12), np.uint8)
    targets[random.random(100) < 0.3] = -100
    train, test = slice(72), slice(72, None)
    np.savez(
        folder / "images.npz", x_train=inputs[train], y_train=targets[train], x_test=inputs[test], y_test=targets[test]
    )
    write_spam(folder / "spam.csv", 400)
    images = ["--dataset", f"npz:{folder / 'images.npz'}", *REGULARISED]
    spam = ["--dataset", f"csv:{folder / 'spam.csv'}", *SPAM]
    for ranks in RANKS:
        flags = {
            "shared": [*images, "--sync-batch-norm"],
            "virtual": [*images, "--virtual-ranks", "6"],
        }
        if ranks == 2:
            flags |= {strategy: [*spam, "--strategy", strategy] for strategy in ("sync", "hogwild")}
        train_all(ranks, [[*each, "--output", str(folder / f"{ranks}-{name}")] for name, each in flags.items()])
    return folder


def test_ranks_train_on_the_same_changed_images_by_the_same_loss(runs: Path) -> None:
    summaries = [summary_of(runs / f"{ranks}-shared") for ranks in RANKS]
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert [each[name] for each in summaries] == pytest.approx([summaries[0][name]] * 3, abs=1e-4)


def test_virtual_ranks_train_to_the_same_bits(runs: Path) -> None:
    summaries = [summary_of(runs / f"{ranks}-virtual") for ranks in RANKS]
    assert len({each["parameters_sha256"] for each in summaries}) == 1
    assert len({each["test_loss"] for each in summaries}) == 1


@pytest.mark.parametrize("strategy", ["sync", "hogwild"])
def test_spam_is_told_from_ham(runs: Path, strategy: str) -> None:
    assert summary_of(runs / f"2-{strategy}")["test_accuracy"] > 0.95


MISTAKES = [
    (["--label-smoothing", "0.1", "--loss", "hinge"], "--label-smoothing 0.1 with --loss hinge"),
    (["--class-weights", "1,2"], "--class-weights 1,2: expected balanced, or 10 numbers"),
    (["--ignore-index", "1", "--dataset", "diabetes"], "--ignore-index 1: --dataset diabetes is a regression"),
    (["--augment", "flip", "--dataset", "synthetic:20,4,2"], "--augment flip: it needs images"),
    (["--model", "resnet20", "--batch-norm"], "--batch-norm with --model resnet20"),
    (
        ["--batch-norm", "--global-batch-size", "1437"],
        "--batch-norm: of a mini-batch of 1 sample a rank takes 1 at a time, which has no variance",
    ),
    (
        ["--batch-norm", "--global-batch-size", "3", "--accumulate", "2"],
        "--batch-norm: of a mini-batch of 3 samples a rank takes 1 at a time",
    ),
    (["--dataset", "csv:{tmp}/none.csv"], "none.csv"),
    (["--dataset", "text-folder:{tmp}"], "has 0 folders of classes"),
]


@pytest.mark.parametrize(("flags", "named"), MISTAKES)
def test_mistakes_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    arguments = [flag.format(tmp=tmp_path) for flag in flags]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert named in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()
