import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.losses import build_loss, output_width
from allreduce_sgd.models.options import ModelOptions
from allreduce_sgd.models.registry import build_model


def build(name: str, shape: tuple[int, ...], classes: int | None, kind: Any = None, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelOptions(model=name, **changes), shape, classes, 5, kind)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


FLAT = ["linear", "logistic", "perceptron", "mlp"]
IMAGE = ["cnn", "resnet20", "resnet18"]
SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "classes"), [*((name, 10) for name in FLAT + IMAGE), *((name, None) for name in ("linear", "mlp", *IMAGE))]
)
def test_shapes_of_images(name: str, shape: tuple[int, ...], classes: int | None) -> None:
    model = build(name, shape, classes, "features").eval()
    assert model(torch.randn(2, *shape)).shape == (2, classes or 1)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("linear", (7,), 7 * 10 + 10),
        ("mlp", (1, 28, 28), 784 * 512 + 512 + 512 * 512 + 512 + 5130),
        # The figures of the paper (0.27 million) and of public implementations of both.
        ("resnet20", (3, 32, 32), 269_722),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("cnn", (3, 32, 32), 3 * 32 * 25 + 32 + 32 * 32 * 25 + 32 + 32 * 64 * 25 + 64 + 1024 * 64 + 64 + 650),
    ],
)
def test_numbers_of_parameters(name: str, shape: tuple[int, ...], count: int) -> None:
    assert parameters(build(name, shape, 10)) == count


def tiny_batch(name: str) -> tuple[tuple[int, ...], int, Tensor, Tensor]:
    torch.manual_seed(1)
    if name == "chargpt":
        codes = torch.randint(11, (4, 17))
        return (16,), 11, codes[:, :-1], codes[:, 1:]
    inputs = torch.randn(8, 1, 8, 8)
    return (1, 8, 8), 4, inputs, torch.arange(8) % 4


@pytest.mark.parametrize("name", [*FLAT, *IMAGE, "chargpt"])
def test_a_few_steps_lower_the_loss_and_every_parameter_has_a_gradient(name: str) -> None:
    shape, classes, inputs, targets = tiny_batch(name)
    model = build(name, shape, classes)
    loss = build_loss(None, name, classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        values.append(value.item())
    assert min(values[1:]) < values[0] or values[0] == values[-1] == 0
    assert values[-1] < values[0] or name == "perceptron"


@pytest.mark.parametrize("name", ["logistic", "perceptron"])
def test_a_binary_linear_model_separates_what_is_separable(name: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 5)
    targets = (inputs[:, 0] > inputs[:, 1]).long()
    model, loss = build(name, (5,), 2), build_loss(None, name, 2)
    assert output_width(None, name, 2) == 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    correct = loss.correct(model(inputs), targets)
    assert correct is not None
    assert int(correct) >= 195


def test_mlp_widths_and_dropout() -> None:
    model = build("mlp", (6,), 3, hidden="4, 5", dropout=0.5)
    widths = [layer.weight.shape for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert widths == [(4, 6), (5, 4), (3, 5)]
    assert sum(isinstance(layer, nn.Dropout) for layer in model.modules()) == 2
    assert not any(isinstance(layer, nn.Dropout) for layer in build("mlp", (6,), 3).modules())


@pytest.mark.parametrize(("name", "layers"), [("mlp", 2), ("cnn", 4)])
def test_batch_norm_after_each_hidden_layer(name: str, layers: int) -> None:
    plain, model = (build(name, (1, 8, 8), 4, batch_norm=on) for on in (False, True))
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == layers
    assert not any(isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d) for each in plain.modules())
    # What is normalised comes out of the layer before it, and other layers begin with the same weights.
    chain = list(model.children())
    for norm in norms:
        before = chain[chain.index(norm) - 1]
        assert isinstance(before, nn.Linear | nn.Conv2d)
        assert before.weight.shape[0] == norm.num_features
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert all(torch.equal(p, q) for p, q in zip(weights, (p for p in plain.parameters() if p.ndim > 1), strict=True))
    inputs = 5 + 3 * torch.randn(64, 1, 8, 8)
    seen: list[Tensor] = []
    norms[0].register_forward_hook(lambda layer, args, out: seen.append(out))
    model(inputs)
    columns = seen[0].transpose(0, 1).flatten(1)
    assert torch.allclose(columns.mean(1), torch.zeros(len(columns)), atol=1e-4)
    assert torch.allclose(columns.var(1, unbiased=False), torch.ones(len(columns)), atol=1e-2)


def test_cnn_dropout() -> None:
    model = build("cnn", (1, 8, 8), 4, dropout=0.5)
    assert sum(isinstance(layer, nn.Dropout) for layer in model.modules()) == 2
    assert list(build("cnn", (1, 8, 8), 4).state_dict()) == [
        f"{layer}.{part}" for layer in (0, 3, 6, 10, 11) for part in ("weight", "bias")
    ]
    inputs = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), build("cnn", (1, 8, 8), 4).eval()(inputs))


def test_resnet_shortcut_a_pads_with_zeros() -> None:
    blocks = [m for m in build("resnet20", (3, 32, 32), 10).modules() if type(m).__name__ == "_Subsample"]
    assert len(blocks) == 2
    x = torch.randn(1, 16, 4, 4)
    padded = blocks[0](x)
    assert torch.equal(padded[:, :16], x[:, :, ::2, ::2])
    assert torch.equal(padded[:, 16:], torch.zeros(1, 16, 2, 2))


def test_chargpt_is_causal_and_of_the_published_size() -> None:
    model = build("chargpt", (64,), 65, "tokens").eval()
    assert 0.75e6 < parameters(model) < 0.85e6
    codes = torch.randint(65, (2, 64))
    scores = model(codes)
    assert scores.shape == (2, 64, 65)
    changed = codes.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 65
    other = model(changed)
    assert torch.allclose(scores[:, :40], other[:, :40], atol=1e-5)
    assert not torch.allclose(scores[:, 40:], other[:, 40:], atol=1e-3)
    loss = build_loss(None, "chargpt", 65)(scores, codes)
    assert loss.item() == pytest.approx(math.log(65), abs=0.2)
    assert model(codes[:, :10]).shape == (2, 10, 65)


def test_chargpt_dropout_acts_only_in_training() -> None:
    model = build("chargpt", (8,), 5, dropout=0.5)
    codes = torch.randint(5, (2, 8))
    assert not torch.equal(model(codes), model(codes))
    model.eval()
    assert torch.equal(model(codes), model(codes))


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20", "chargpt"])
def test_the_callers_seed_decides(name: str) -> None:
    shape, classes, _, _ = tiny_batch(name)
    first, second = (build(name, shape, classes).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "kind", "changes", "problem"),
    [
        ("nonsense", (4,), 2, None, {}, "--model nonsense: unknown; allowed are linear, .*module:function"),
        ("cnn", (4,), 2, "features", {}, "--model cnn takes images .*--dataset"),
        ("resnet18", (4, 4), 2, None, {}, "--model resnet18 takes images"),
        ("chargpt", (1, 8, 8), 10, None, {}, "--model chargpt takes text .*--dataset"),
        ("chargpt", (8,), 10, "features", {}, "--model chargpt takes text"),
        ("chargpt", (8,), None, None, {}, "--model chargpt takes text"),
        ("mlp", (8,), 10, "tokens", {}, "--model mlp takes features, not text, but the --dataset gives tokens"),
        ("cnn", (8,), 10, "tokens", {}, "--model cnn takes features"),
        ("logistic", (8,), None, None, {}, "--model logistic needs classes"),
        ("mlp", (8,), 10, None, {"hidden": "5,"}, "--hidden 5,: expected positive integers"),
        ("mlp", (8,), 10, None, {"hidden": "0"}, "--hidden 0"),
        ("mlp", (8,), 10, None, {"hidden": "a"}, "--hidden a"),
        (
            "resnet20",
            (1, 8, 8),
            10,
            None,
            {"dropout": 0.1},
            "--dropout 0.1 with --model resnet20: .*only mlp, cnn",
        ),
        (
            "resnet20",
            (1, 8, 8),
            10,
            None,
            {"batch_norm": True},
            "--batch-norm with --model resnet20: .* mlp and cnn",
        ),
        ("linear", (8,), 10, None, {"batch_norm": True}, "--batch-norm with --model linear"),
        ("mlp", (8,), None, None, {"loss": "hinge"}, "--loss hinge"),
    ],
)
def test_models_that_do_not_suit(
    name: str, shape: tuple[int, ...], classes: int | None, kind: str | None, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        build(name, shape, classes, kind, **changes)


MODULE = """
import torch
from torch import nn

def net(classes, input_shape, seed, extra=1):
    assert (classes, input_shape, seed, extra) == (3, (4,), 5, 1)
    return nn.Linear(4, classes)

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(4, classes)

def empty(): return nn.ReLU()
def frozen(): return nn.Linear(2, 2).requires_grad_(False)
def number(): return 3
def raises(): raise ValueError("no\\nway")
"""


@pytest.fixture
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_model.py").write_text(MODULE)
    yield
    sys.modules.pop("users_model", None)


@pytest.mark.usefixtures("_module")
def test_models_of_the_users_own() -> None:
    assert isinstance(build("users_model:net", (4,), 3, "features"), nn.Linear)
    assert parameters(build("users_model:Net", (4,), 3, "tokens")) == 15


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("empty", "the model has no parameters to train"),
        ("frozen", "the model has no parameters to train"),
        ("number", "returned a int; expected a torch.nn.Module"),
        ("raises", "the function raised: ValueError: no way"),
        ("absent", "users_model has no function absent"),
    ],
)
def test_mistakes_of_the_users_own(function: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^--model users_model:{function}: .*{problem}"):
        build(f"users_model:{function}", (4,), 3)
