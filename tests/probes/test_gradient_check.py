"""Back-propagation against numerical differences on whole models: right ones pass, wrong ones are found."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.models.chargpt import chargpt
from allreduce_sgd.models.cnn import cnn
from allreduce_sgd.models.losses import Loss, build_loss
from allreduce_sgd.models.mlp import mlp
from allreduce_sgd.models.sparse_logistic import SparseLogistic
from allreduce_sgd.probes.gradient_check import worst_element
from allreduce_sgd.probes.numerical import TOLERANCE
from allreduce_sgd.random_state import random_state
from tests.parts import wrong_gradient_model

CLASSES = 3
CROSS_ENTROPY = build_loss(None, "mlp", CLASSES)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 1, 8, 8), torch.arange(6) % CLASSES


def error_of(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss = CROSS_ENTROPY, elements: int = 16) -> Any:
    return worst_element(model, loss, inputs, targets, elements, (1, 0))


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(108, CLASSES)
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # More only wait for one another, on models so small.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: mlp((1, 8, 8), CLASSES, (16, 16), 0.3), "cross-entropy"),
        (lambda: mlp((1, 8, 8), CLASSES, (16, 16), 0.3), "l1"),
        (lambda: cnn((1, 8, 8), CLASSES), "hinge"),
        (normalised, "cross-entropy"),
    ],
    ids=["mlp with dropout", "l1", "cnn with hinge", "batch normalisation"],
)
def test_right_gradients_pass(make: Callable[[], nn.Module], loss: str) -> None:
    torch.manual_seed(0)
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = images()
    generators = random_state(torch.device("cpu"))
    assert error_of(model, *samples, build_loss(loss, "mlp", CLASSES)).error < TOLERANCE
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random_state(torch.device("cpu"))["torch"], generators["torch"])


def test_tokens_and_sparse_gradients_pass() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(5, (2, 6))
    assert error_of(chargpt(6, 5, 5, 0.1), tokens, tokens, build_loss(None, "chargpt", 5)).error < TOLERANCE
    samples = torch.stack([torch.randint(20, (4, 3)).float(), torch.randn(4, 3)], 2)
    labels, loss = torch.arange(4) % 2, build_loss(None, "sparse-logistic", 2)
    assert error_of(SparseLogistic(20, 1), samples, labels, loss).error < TOLERANCE


def test_a_wrong_gradient_is_found_and_named() -> None:
    torch.manual_seed(0)
    found = error_of(wrong_gradient_model(CLASSES), *images(), elements=8)
    assert found.element.startswith("bias[")
    assert found.error == pytest.approx(1e-3, rel=0.01)
    assert found.derivative / found.numerical == pytest.approx(1.001, rel=1e-5)


def test_elements_go_round_the_parameters() -> None:
    torch.manual_seed(0)
    model = wrong_gradient_model(CLASSES)
    # As many as there are parameters: the wrong one among them, whatever the seed.
    for seed in range(5):
        assert worst_element(model, CROSS_ENTROPY, *images(), 4, (seed,)).element.startswith("bias[")
