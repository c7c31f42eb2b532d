"""Label smoothing, class weights and ignored labels, against torch's functional forms and closed forms; edge cases."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.losses import Loss, build_loss, output_width
from allreduce_sgd.models.options import LOSSES

CLASSES = 3
WEIGHTS = (0.5, 2.0, 3.0)
IGNORED = -100
GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(12, CLASSES, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, IGNORED, 2, 0, IGNORED, 1, 1, 0, 0, 0])
COUNTS = (5, 3, 2, 2)
SMOOTHED = ("cross-entropy", "nll", "kl", "logistic")


def full(name: str = "cross-entropy", smoothing: float = 0.0, weights: str | None = "0.5,2,3") -> Loss:
    """For LABELS as the whole training set."""
    return build_loss(name, "mlp", CLASSES, smoothing, weights, IGNORED, COUNTS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weights", [None, "0.5,2,3"])
@pytest.mark.parametrize("name", ["cross-entropy", "nll", "logistic"])
def test_over_the_training_set_it_is_the_cross_entropy_of_torch(
    name: str, smoothing: float, weights: str | None
) -> None:
    scores = [SCORES.clone().requires_grad_() for _ in range(2)]
    loss = full(name, smoothing, weights)(scores[0], LABELS)
    torchs = functional.cross_entropy(
        scores[1],
        LABELS,
        None if weights is None else torch.tensor(WEIGHTS, dtype=torch.float64),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(loss, torchs)
    gradients = [torch.autograd.grad(value, each)[0] for value, each in zip((loss, torchs), scores, strict=True)]
    torch.testing.assert_close(*gradients)
    assert not bool(gradients[0][LABELS == IGNORED].any())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_kl_is_that_of_torch_from_the_smoothed_distribution(smoothing: float) -> None:
    labels = LABELS.clamp(min=0)
    smoothed = (1 - smoothing) * functional.one_hot(labels, CLASSES).double() + smoothing / CLASSES
    expected = functional.kl_div(functional.log_softmax(SCORES, 1), smoothed, reduction="batchmean")
    torch.testing.assert_close(build_loss("kl", "mlp", CLASSES, smoothing)(SCORES, labels), expected)


def test_a_smoothed_single_score_stands_for_the_scores_0_and_s() -> None:
    score, labels = torch.randn(9, 1, generator=GENERATOR), torch.arange(9) % 2
    expected = functional.binary_cross_entropy_with_logits(score[:, 0], labels * 0.8 + 0.1)
    torch.testing.assert_close(build_loss("logistic", "logistic", 2, 0.2)(score, labels), expected)


def parts_of(loss: Loss, outputs: Tensor, targets: Tensor, ranks: int) -> Tensor:
    """The gradient that ranks come to together, each weighing the mean of its share by its number of samples."""
    total = torch.zeros_like(outputs)
    for own in torch.arange(len(outputs)).tensor_split(ranks):
        leaf = outputs.clone().requires_grad_()
        (loss(leaf[own], targets[own]) * (len(own) / len(outputs))).backward()
        assert leaf.grad is not None
        total += leaf.grad
    return total


@pytest.mark.parametrize("ranks", [2, 3, 7, 12])
@pytest.mark.parametrize(
    ("name", "classes", "smoothing"),
    [*((name, classes, 0.0) for name in LOSSES for classes in (2, 3)), ("cross-entropy", 3, 0.1), ("kl", 3, 0.1)],
)
def test_any_number_of_ranks_comes_to_the_same_gradient(name: str, classes: int, smoothing: float, ranks: int) -> None:
    weights = "balanced" if name == "mse" else ",".join(map(str, WEIGHTS[:classes]))
    loss = build_loss(name, "mlp", classes, smoothing, weights, IGNORED, (4, 3, 2, 1)[: classes + 1])
    outputs = torch.randn(12, output_width(name, "mlp", classes), generator=GENERATOR, dtype=torch.float64)
    targets = torch.where(LABELS < 0, LABELS, LABELS % classes)
    torch.testing.assert_close(parts_of(loss, outputs, targets, ranks), parts_of(loss, outputs, targets, 1))


def test_the_mean_over_all_mini_batches_is_the_loss_of_the_training_set() -> None:
    """Which is not so where every mini-batch is divided by its own sum of weights, as torch's is."""
    loss = full()
    batches = [loss(SCORES[own], LABELS[own]) for own in torch.arange(12).split(3)]
    torch.testing.assert_close(torch.stack(batches).mean(), loss(SCORES, LABELS))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    torchs = [
        functional.cross_entropy(SCORES[own], LABELS[own], weights, ignore_index=IGNORED)
        for own in torch.arange(12).split(3)
    ]
    assert abs(float(torch.stack(torchs).mean() - loss(SCORES, LABELS))) > 1e-3


def test_hinge_and_squares_are_weighted_by_the_label() -> None:
    scores, labels = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), torch.tensor([0, 2])
    # Of both samples alone 2 and 0; 5 / 3 and 4.25 / 3. The mean weight of the training set is 7 / 4.
    for name, values in (("hinge", (2.0, 0.0)), ("mse", (5 / 3, 4.25 / 3))):
        loss = build_loss(name, "mlp", 3, 0.0, "1,5,2.5", None, (2, 0, 2, 0))
        assert float(loss(scores, labels)) == pytest.approx((values[0] + 2.5 * values[1]) / 2 / 1.75)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 5 + [1] * 3 + [2] * 2
    loss = full(weights="Balanced")
    assert loss.class_weights == pytest.approx(
        compute_class_weight("balanced", classes=np.arange(3), y=labels).tolist()
    )
    only_one = build_loss("hinge", "mlp", 3, 0.0, "balanced", None, (0, 7, 0, 0))
    assert (only_one.class_weights, only_one.mean_weight) == ((0.0, 1.0, 0.0), 1.0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [2, 3])
def test_where_all_labels_are_ignored_loss_and_gradient_are_zero(name: str, classes: int) -> None:
    loss = build_loss(name, "mlp", classes, 0.0, None, IGNORED, (1, *[1] * classes))
    for each in (loss, loss.of_evaluation()):
        outputs = torch.randn(4, output_width(name, "mlp", classes), requires_grad=True)
        value = each(outputs, torch.full((4,), IGNORED))
        value.backward()
        assert value.item() == 0
        assert outputs.grad is not None
        assert torch.equal(outputs.grad, torch.zeros_like(outputs))
        correct = each.correct(outputs, torch.full((4,), IGNORED))
        assert correct is not None
        assert (int(correct), each.count(torch.full((4,), IGNORED))) == (0, 0)


def test_ignored_labels_are_not_counted() -> None:
    loss = full()
    correct = loss.correct(functional.one_hot(LABELS.clamp(min=0), CLASSES).float(), LABELS)
    assert correct is not None
    assert (int(correct), loss.count(LABELS)) == (10, 10)
    # One that is a class is ignored too, also in texts.
    texts = build_loss(None, "chargpt", 4, 0.0, None, 0, (5, 5, 5, 0, 5))
    codes = torch.tensor([[0, 1, 2], [3, 0, 0]])
    scores = functional.one_hot(codes, 4).float()
    correct = texts.correct(scores, codes)
    assert correct is not None
    assert (int(correct), texts.count(codes)) == (3, 3)


def test_an_evaluation_is_neither_smoothed_nor_weighted() -> None:
    """Batches are put together by how many of their labels count, as a tally does."""
    loss = full(smoothing=0.3).of_evaluation()
    batches = [(loss(SCORES[own], LABELS[own]), loss.weight(LABELS[own])) for own in torch.arange(12).split(5)]
    mean = sum(float(value) * weight for value, weight in batches) / sum(weight for _, weight in batches)
    assert mean == pytest.approx(float(functional.cross_entropy(SCORES, LABELS, ignore_index=IGNORED)))
    plain = build_loss(None, "mlp", 3)
    assert plain.of_evaluation() == plain
    assert plain.weight(LABELS) == 12


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3])
def test_very_large_scores_have_finite_losses_and_gradients(name: str, dtype: torch.dtype, classes: int) -> None:
    largest = 6e4 if dtype == torch.float16 else 1e15
    width = output_width(name, "mlp", classes)
    smoothing = 0.1 if name in SMOOTHED else 0.0
    loss = build_loss(name, "mlp", classes, smoothing, "1,2,3"[: 2 * classes - 1], None, (3, 3, 3, 0)[: classes + 1])
    for high, low in ((largest, -largest), (-largest, largest)):
        outputs = torch.full((2, width), low).to(dtype)
        outputs[:, -1] = high
        outputs.requires_grad_()
        value = loss(outputs, torch.tensor([0, classes - 1]))
        value.backward()
        assert value.dtype == torch.float32
        assert math.isfinite(value.item())
        assert outputs.grad is not None
        assert bool(outputs.grad.isfinite().all())


def test_a_probability_that_rounds_to_zero_is_no_nan_in_kl() -> None:
    scores = torch.tensor([[3e38, -3e38]], requires_grad=True)
    value = build_loss("kl", "mlp", 2)(scores, torch.tensor([0]))
    value.backward()
    assert value.item() == 0
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batches_with_weights(name: str) -> None:
    loss = build_loss(name, "mlp", 3, 0.0, "1,2,3", IGNORED, COUNTS)
    outputs = torch.zeros(0, 3, requires_grad=True)
    value = loss(outputs, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize(
    ("name", "classes", "smoothing", "weights", "counts", "problem"),
    [
        ("hinge", 3, 0.1, None, None, "--label-smoothing 0.1 with --loss hinge: only cross-entropy, nll, kl, logistic"),
        (None, None, 0.1, None, None, "--label-smoothing 0.1 with --loss mse"),
        (None, None, 0.0, "1,2", None, "--class-weights 1,2: the --dataset is a regression"),
        (None, 3, 0.0, "1,2", (1, 1, 1, 0), "--class-weights 1,2: expected balanced, or 3 numbers of at least 0"),
        (None, 2, 0.0, "1,-2", (1, 1, 0), "--class-weights 1,-2"),
        (None, 2, 0.0, "1,nan", (1, 1, 0), "--class-weights 1,nan"),
        (None, 2, 0.0, "1,inf", (1, 1, 0), "--class-weights 1,inf"),
        (None, 2, 0.0, "heavy", (1, 1, 0), "--class-weights heavy"),
        (None, 2, 0.0, "0,1", (5, 0, 0), "--class-weights 0,1: no class of the training set has a weight above 0"),
        (None, 2, 0.0, "balanced", (0, 0, 4), "--ignore-index -100: every target of the training set"),
    ],
)
def test_mistakes(
    name: str | None,
    classes: int | None,
    smoothing: float,
    weights: str | None,
    counts: tuple[int, ...] | None,
    problem: str,
) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_loss(name, "mlp", classes, smoothing, weights, IGNORED, counts)
