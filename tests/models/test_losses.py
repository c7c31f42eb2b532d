import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.losses import Loss, build_loss, output_width
from allreduce_sgd.models.options import LOSSES

SCORES = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0], [2.0, 2.0, 0.0], [-1.0, 4.0, 0.0]])
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("name", ["cross-entropy", "nll", "kl", "logistic"])
def test_cross_entropy_in_its_guises(name: str) -> None:
    loss = build_loss(name, "mlp", 3)(SCORES, LABELS)
    assert torch.allclose(loss, functional.cross_entropy(SCORES, LABELS))


def test_nll_and_kl_are_those_of_torch() -> None:
    log_probabilities = functional.log_softmax(SCORES, 1)
    expected = functional.nll_loss(log_probabilities, LABELS)
    assert torch.allclose(build_loss("nll", "mlp", 3)(log_probabilities, LABELS), expected)
    one_hot = functional.one_hot(LABELS, 3).float()
    expected = functional.kl_div(log_probabilities, one_hot, reduction="batchmean")
    assert torch.allclose(build_loss("kl", "mlp", 3)(SCORES, LABELS), expected)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # max_j (s_j + [j != y]) - s_y
        ("hinge", [2.0, 0.0, 1.0, 5.0]),
        # max_j s_j - s_y
        ("perceptron", [1.0, 0.0, 0.0, 4.0]),
        ("mse", [(0 + 4 + 1) / 3, (0.25 + 0 + 4) / 3, (4 + 1 + 0) / 3, (1 + 16 + 1) / 3]),
        ("l1", [(0 + 2 + 1) / 3, (0.5 + 0 + 2) / 3, (2 + 1 + 0) / 3, (1 + 4 + 1) / 3]),
    ],
)
def test_values_of_many_classes(name: str, values: list[float]) -> None:
    assert float(build_loss(name, "mlp", 3)(SCORES, LABELS)) == pytest.approx(sum(values) / 4)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hinge", [0.0, 3.0, 0.5, 1.0]),
        ("perceptron", [0.0, 2.0, 0.0, 0.0]),
        ("logistic", [math.log1p(math.exp(-3)), math.log1p(math.exp(2)), math.log1p(math.exp(-0.5)), math.log(2)]),
    ],
)
@pytest.mark.parametrize("column", [False, True])
def test_values_of_a_single_score(name: str, values: list[float], column: bool) -> None:
    scores = torch.tensor([3.0, 2.0, -0.5, 0.0])
    loss = build_loss(name, "mlp", 2)
    outputs = scores[:, None] if column else scores
    labels = torch.tensor([1, 0, 0, 1])
    assert float(loss(outputs, labels)) == pytest.approx(sum(values) / 4)
    correct = loss.correct(outputs, labels)
    assert correct is not None
    assert int(correct) == 2


@pytest.mark.parametrize("name", ["hinge", "perceptron", "logistic"])
def test_two_scores_for_two_classes(name: str) -> None:
    scores, labels = torch.tensor([[1.0, 3.0]]), torch.tensor([0])
    expected = {"hinge": 3.0, "perceptron": 2.0, "logistic": math.log1p(math.exp(2))}[name]
    assert float(build_loss(name, "mine:model", 2)(scores, labels)) == pytest.approx(expected)


@pytest.mark.parametrize("outputs", [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[1.0], [2.0], [4.0]])])
@pytest.mark.parametrize("targets", [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0], [0.0], [1.0]])])
def test_regression_never_broadcasts(outputs: Tensor, targets: Tensor) -> None:
    assert float(build_loss(None, "mlp", None)(outputs, targets)) == pytest.approx(13 / 3)
    assert float(build_loss("l1", "mlp", None)(outputs, targets)) == pytest.approx(5 / 3)


def test_regression_of_several_values() -> None:
    outputs, targets = torch.randn(5, 3), torch.randn(5, 3)
    loss = build_loss("mse", "mlp", None)
    assert torch.allclose(loss(outputs, targets), functional.mse_loss(outputs, targets))
    assert loss.correct(outputs, targets) is None
    assert loss.count(targets) == 5


@pytest.mark.parametrize(
    ("name", "classes"), [*((name, classes) for name in LOSSES for classes in (2, 5)), ("mse", None), ("l1", None)]
)
def test_weighted_means_of_any_parts_are_the_mean_of_all(name: str, classes: int | None) -> None:
    loss = build_loss(name, "mlp", classes)
    outputs = torch.randn(7, output_width(name, "mlp", classes), dtype=torch.float64)
    targets = torch.randn(7, dtype=torch.float64) if classes is None else torch.arange(7) % classes
    whole = loss(outputs, targets)
    for cut in (0, 1, 4):
        parts = loss(outputs[:cut], targets[:cut]) * cut + loss(outputs[cut:], targets[cut:]) * (7 - cut)
        assert torch.allclose(parts / 7, whole)


def test_an_empty_batch_is_zero_and_has_a_gradient() -> None:
    weights = torch.ones(3, 2, requires_grad=True)
    loss = build_loss(None, "mlp", 2)(torch.zeros(0, 3) @ weights, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert weights.grad is not None
    assert torch.equal(weights.grad, torch.zeros(3, 2))


def test_text() -> None:
    scores, codes = torch.randn(4, 6, 9), torch.randint(9, (4, 6))
    loss = build_loss(None, "chargpt", 9)
    assert torch.allclose(loss(scores, codes), functional.cross_entropy(scores.transpose(1, 2), codes))
    correct = loss.correct(scores, codes)
    assert correct is not None
    assert correct.dtype == torch.int64
    assert int(correct) == int((scores.argmax(2) == codes).sum())
    assert loss.count(codes) == 24


def test_half_precision_scores_are_not_summed_in_half_precision() -> None:
    loss = build_loss("hinge", "mlp", 3)(SCORES.bfloat16(), LABELS)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["perceptron", "hinge", "logistic"])
@pytest.mark.parametrize("classes", [2, 4])
def test_zero_scores_have_a_gradient(name: str, classes: int) -> None:
    scores = torch.zeros(3, output_width(name, "linear", classes), requires_grad=True)
    build_loss(name, "linear", classes)(scores, torch.tensor([0, 1, 1])).backward()
    assert scores.grad is not None
    assert bool((scores.grad.abs().sum(1) > 0).all())


@pytest.mark.parametrize(
    ("name", "model", "classes", "chosen", "width"),
    [
        (None, "mlp", 10, "cross-entropy", 10),
        (None, "mlp", 2, "cross-entropy", 2),
        (None, "linear", None, "mse", 1),
        (None, "logistic", 2, "logistic", 1),
        (None, "Logistic", 3, "logistic", 3),
        (None, "perceptron", 2, "perceptron", 1),
        ("Hinge", "linear", 2, "hinge", 1),
        ("hinge", "perceptron", 3, "hinge", 3),
        ("mse", "mlp", 2, "mse", 2),
        ("l1", "logistic", None, "l1", 1),
    ],
)
def test_choice_and_width(name: str | None, model: str, classes: int | None, chosen: str, width: int) -> None:
    assert build_loss(name, model, classes) == Loss(chosen, classes)
    assert output_width(name, model, classes) == width


@pytest.mark.parametrize(
    ("name", "model", "classes", "problem"),
    [
        ("nonsense", "mlp", 10, "--loss nonsense: allowed are cross-entropy, mse"),
        (
            "cross-entropy",
            "mlp",
            None,
            "--loss cross-entropy: allowed for a --dataset with floating targets are mse, l1",
        ),
        ("kl", "mlp", None, "--loss kl"),
        (None, "logistic", None, "--model logistic needs classes"),
    ],
)
def test_losses_that_do_not_suit(name: str | None, model: str, classes: int | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_loss(name, model, classes)


@pytest.mark.parametrize(
    ("name", "classes", "outputs", "targets"),
    [
        ("cross-entropy", 3, torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)),
        ("cross-entropy", 3, torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64)),
        ("cross-entropy", 2, torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)),
        ("hinge", 3, torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)),
        ("mse", None, torch.zeros(4, 2), torch.zeros(4)),
        ("mse", None, torch.zeros(4, 1), torch.zeros(3)),
        ("mse", None, torch.tensor(0.0), torch.zeros(1)),
        ("cross-entropy", 3, torch.tensor(0.0), torch.zeros(1, dtype=torch.int64)),
    ],
)
def test_shapes_that_do_not_fit(name: str, classes: int | None, outputs: Tensor, targets: Tensor) -> None:
    with pytest.raises(ConfigError, match=f"--loss {name}: the model's outputs"):
        build_loss(name, "mine:model", classes)(outputs, targets)
