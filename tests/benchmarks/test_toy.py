"""Toy landscapes against autograd, and what each optimizer is known to do on them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.optim.options import OptimizerOptions
from benchmarks.toy import main, row_of, table
from benchmarks.toy_landscapes import LANDSCAPES
from benchmarks.toy_plot import animate, draw
from benchmarks.toy_trajectories import (
    LEARNING_RATES,
    Contender,
    best,
    contenders,
    descend,
    known_contenders,
    lowest_value,
    steps_to,
    without_noise,
)


def named(name: str) -> Contender:
    return contenders([name])[0]


@pytest.mark.parametrize("name", list(LANDSCAPES))
def test_gradients_are_those_of_autograd(name: str) -> None:
    landscape = LANDSCAPES[name]
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (by_autograd,) = torch.autograd.grad(landscape.value(points).sum(), points)
    assert torch.allclose(landscape.gradient(points), by_autograd, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["logistic", "beale"])
def test_the_minimum_is_one(name: str) -> None:
    landscape = LANDSCAPES[name]
    assert landscape.minimum is not None
    point = torch.tensor(landscape.minimum(), dtype=torch.float64)
    assert float(landscape.gradient(point).norm()) < 1e-12
    hessian = torch.autograd.functional.hessian(landscape.value, point)
    assert float(torch.linalg.eigvalsh(hessian)[0]) > 0.01
    lowest = lowest_value(landscape)
    assert lowest == float(landscape.value(point))
    if name == "beale":
        assert lowest == 0
    # The two ends of the box and the start are above it.
    assert float(landscape.value(torch.tensor(landscape.start, dtype=torch.float64))) > lowest


@pytest.mark.parametrize("name", list(known_contenders()))
def test_every_optimizer_gets_down_on_beale(name: str) -> None:
    lr = {"newton": 1.0, "newton-damped": 1.0, "lbfgs": 0.3, "adadelta": 3.0}.get(name, 0.003)
    trajectory = descend(LANDSCAPES["beale"], named(name), lr, 12)
    assert not trajectory.diverged
    assert float(trajectory.values[-1]) < 0.99 * float(trajectory.values[0])
    assert len(trajectory.points) == len(trajectory.values) == 13


def test_gradient_descent_takes_the_steps_of_its_formula() -> None:
    landscape = LANDSCAPES["beale"]
    point = torch.tensor(landscape.start, dtype=torch.float64)
    trajectory = descend(landscape, named("sgd"), 0.01, 5)
    for found in trajectory.points[1:]:
        point = point - 0.01 * landscape.gradient(point)
        assert torch.allclose(found, point, rtol=1e-12)
    assert trajectory.gradients == 5


def test_on_the_axis_of_the_saddle_only_noise_leaves_it() -> None:
    landscape = LANDSCAPES["saddle-axis"]
    (quiet,) = without_noise(landscape)
    stays = descend(landscape, quiet, 0.1, 150)
    assert torch.equal(stays.points[:, 0], torch.zeros(151, dtype=torch.float64))
    assert float(stays.points[-1, 1]) < 0.15
    assert steps_to(stays, landscape.bottom) is None
    leaves = descend(landscape, named("sgd-momentum"), 0.1, 150)
    reached = steps_to(leaves, landscape.bottom)
    assert reached == leaves.steps
    assert abs(float(leaves.points[-1, 0])) > 0.5
    # The first step is that without noise, and the noise, times the learning rate.
    kick = (descend(landscape, named("sgd"), 0.1, 1).points - descend(landscape, quiet, 0.1, 1).points)[-1]
    drawn = torch.randn(1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0]
    assert torch.allclose(kick, -0.1 * landscape.noise * drawn)


def test_newton_is_attracted_to_the_saddle() -> None:
    """Of x⁴ and of y⁴ Newton's step takes a third, uphill in x as well as downhill in y."""
    landscape = LANDSCAPES["saddle"]
    trajectory = descend(landscape, named("newton"), 1.0, 10)
    factor = (2 / 3) ** torch.arange(11, dtype=torch.float64)
    start = torch.tensor(landscape.start, dtype=torch.float64)
    assert torch.allclose(trajectory.points, factor[:, None] * start, rtol=1e-9)
    away = descend(landscape, named("newton-damped"), 1.0, 60)
    assert float(away.values[-1]) < float(away.values[0])


def test_newton_is_soon_at_the_minimum_of_the_logistic_loss() -> None:
    landscape = replace(LANDSCAPES["logistic"], start=(0.0, 0.0))
    lowest = lowest_value(landscape)
    assert lowest is not None
    assert float(descend(landscape, named("newton"), 1.0, 6).values[-1]) == pytest.approx(lowest, abs=1e-12)


def test_the_heavy_ball_is_torchs_momentum_where_the_learning_rate_is_constant() -> None:
    ours, torchs = (descend(LANDSCAPES["beale"], named(name), 0.003, 20) for name in ("heavy-ball", "sgd-momentum"))
    assert torch.allclose(ours.points, torchs.points, rtol=1e-9)


def test_nesterov_goes_as_in_the_textbook_and_torchs_form_looks_ahead_from_there() -> None:
    landscape = LANDSCAPES["beale"]
    textbook, torchs = (descend(landscape, named(name), 0.003, 20).points for name in ("nesterov", "sgd-nesterov"))
    before = point = torch.tensor(landscape.start, dtype=torch.float64)
    for found, ahead in zip(textbook[1:], torchs[1:], strict=True):
        moved = point + 0.9 * (point - before)
        before, point = point, moved - 0.003 * landscape.gradient(moved)
        assert torch.allclose(found, point, rtol=1e-9)
        assert torch.allclose(ahead, point + 0.9 * (point - before), rtol=1e-9)


def test_the_learning_rate_is_the_one_of_the_grid_that_ends_lowest() -> None:
    landscape = LANDSCAPES["beale"]
    chosen = best(landscape, named("sgd"), 10)
    ends = {lr: descend(landscape, named("sgd"), lr, 10) for lr in LEARNING_RATES}
    assert ends[LEARNING_RATES[-1]].diverged
    assert chosen.lr == min((lr for lr in ends if not ends[lr].diverged), key=lambda lr: float(ends[lr].values[-1]))


def test_a_leap_down_the_saddle_does_not_count() -> None:
    landscape = LANDSCAPES["saddle"]
    leap = descend(landscape, named("rmsprop"), 1.0, 40)
    assert steps_to(leap, landscape.bottom) == 1
    chosen = best(landscape, named("rmsprop"), 40)
    assert chosen.lr < 0.1
    assert float(chosen.points.diff(dim=0).norm(dim=1).max()) <= 0.5


def test_a_row_says_what_became_of_a_trajectory() -> None:
    landscape = LANDSCAPES["beale"]
    sgd = named("sgd")
    row = row_of("beale", landscape, sgd, descend(landscape, sgd, 0.01, 4), 4, 0)
    assert row["gap"] == row["value"]
    assert row["distance"] == pytest.approx(((row["end"][0] - 3) ** 2 + (row["end"][1] - 0.5) ** 2) ** 0.5)
    lost = row_of("beale", landscape, sgd, descend(landscape, sgd, 30.0, 4), 4, 0)
    assert lost["diverged"]
    assert (lost["value"], lost["gap"], lost["distance"], lost["end"]) == (None, None, None, None)
    lines = table([row, lost]).splitlines()
    assert lines[0].split()[-3:] == ["above", "minimum", "distance"]
    assert lines[3].split()[1:4] == ["30*", "1", "1"]
    assert "diverged" in lines[3]
    json.dumps([row, lost], allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_pictures_show_every_family(tmp_path: Path) -> None:
    landscape = LANDSCAPES["saddle-axis"]
    who = [*without_noise(landscape), named("adam"), Contender("other", "Others", OptimizerOptions("nadam"))]
    found = {each: descend(landscape, each, 0.1, 2) for each in who}
    draw(landscape, found, tmp_path / "saddle.png")
    picture = imread(tmp_path / "saddle.png")
    assert all(edge[..., :3].min() == 1 for edge in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]))
    animate(landscape, {each: found[each] for each in who[:1]}, tmp_path / "saddle.gif")
    with Image.open(tmp_path / "saddle.gif") as animation:
        assert isinstance(animation, GifImageFile)
        assert animation.n_frames >= 3


def test_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--landscapes", "beale,saddle", "--optimizers", "adam,sgd", "--steps", "2", "--start", "0.5,1"]
    assert main([*arguments, "-o", str(tmp_path / "new"), "--json", str(tmp_path / "toy.json")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"beale.png", "saddle.png"}
    told = capsys.readouterr().out
    assert "Beale's function" in told
    assert "steps until down" in told or "distance" in told
    record = json.loads((tmp_path / "toy.json").read_text())
    assert record["benchmark"] == "toy"
    assert [(row["landscape"], row["optimizer"]) for row in record["rows"]] == [
        (landscape, name) for landscape in ("beale", "saddle") for name in ("sgd", "adam")
    ]
    assert all(row["start"] == [0.5, 1.0] for row in record["rows"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--landscapes", "alps"], "--landscapes: unknown value 'alps'; choose from logistic, beale, saddle"),
        (["--optimizers", "muon"], "--optimizers: unknown value 'muon'; choose from all, sgd, sgd-momentum"),
        (["--steps", "0"], "--steps: '0' is not a whole number"),
        (["--start", "1"], "--start: '1' is not two numbers"),
        (["--start", "nan,1"], "--start: 'nan,1' is not two numbers"),
        (["--noise", "-1"], "--noise: '-1' is not a number above 0"),
        (["--json", "missing/toy.json"], "--json missing/toy.json: name a file"),
        (["-o", __file__], f"--output {__file__}: cannot be made a folder"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-o", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"toy: error: {said}")
    assert len(error.splitlines()) == 1


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown value 'sparseadam'"):
        contenders(["sparseadam"])
