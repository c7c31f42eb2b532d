"""The synthetic sparse data set, and the model for it."""

import pytest
import torch

from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.split import Dataset, Split
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.losses import build_loss
from allreduce_sgd.models.options import ModelOptions
from allreduce_sgd.models.registry import build_model


def load(specification: str = "2000,100,2", density: float = 0.05, seed: int = 0, **changes: object) -> Dataset:
    options = {"dataset": f"synthetic-sparse:{specification}", "density": density, **changes}
    return load_dataset(DataOptions(**options), seed)  # type: ignore[arg-type]


def splits(dataset: Dataset) -> tuple[Split, Split]:
    assert isinstance(dataset.train, Split)
    assert isinstance(dataset.test, Split)
    return dataset.train, dataset.test


@pytest.mark.parametrize(
    ("features", "density", "nonzeros"),
    [(100, 0.05, 5), (1000, 0.01, 10), (7, 0.5, 4), (10, 1.0, 10), (100, 1e-6, 1), (1, 0.3, 1)],
)
def test_samples_have_as_many_distinct_features_as_the_density_says(
    features: int, density: float, nonzeros: int
) -> None:
    dataset = load(f"500,{features},2", density)
    train, test = splits(dataset)
    assert dataset.input_shape == (nonzeros, 2)
    assert (dataset.kind, dataset.sparse_features, dataset.classes) == ("sparse", features, 2)
    assert (len(train), len(test)) == (400, 100)
    assert train.inputs.dtype == torch.float32
    indices = torch.cat([train.inputs, test.inputs])[:, :, 0]
    assert torch.equal(indices, indices.round())
    assert bool((indices.diff(dim=1) > 0).all())
    assert 0 <= float(indices.min()) <= float(indices.max()) < features


def test_every_feature_occurs_as_often_as_the_density_says() -> None:
    indices = splits(load("5000,40,2", 0.1))[0].inputs[:, :, 0].long()
    frequency = torch.bincount(indices.flatten(), minlength=40) / len(indices)
    assert float((frequency - 0.1).abs().max()) < 4.5 * (0.1 * 0.9 / len(indices)) ** 0.5


def test_data_follow_from_the_seed() -> None:
    first, again, other = (splits(load(seed=seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, other.inputs)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_model_learns_them_nearly_to_the_noise_of_the_labels(classes: int) -> None:
    """By full-batch gradient descent with sparse gradients."""
    train, test = splits(load(f"5000,40,{classes}", 0.1))
    model = build_model(ModelOptions(model="sparse-logistic"), (4, 2), classes, 0, "sparse", 40)
    loss = build_loss(None, "sparse-logistic", classes)
    assert loss.name == "logistic"
    assert [tuple(one.shape) for one in model.parameters()] == [(40, 1 if classes == 2 else classes)]
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    for _ in range(40):
        optimizer.zero_grad()
        loss(model(train.inputs), train.targets).backward()
        gradient = next(model.parameters()).grad
        assert gradient is not None
        assert gradient.is_sparse
        optimizer.step()
    right = loss.correct(model(test.inputs), test.targets)
    assert right is not None
    assert 0.88 < float(right) / len(test) < 0.975


def test_the_model_is_linear_in_dense_samples() -> None:
    """Against the same samples as dense vectors; its gradient touches only the rows of the mini-batch."""
    train, _ = splits(load("60,30,3", 0.1))
    inputs = train.inputs[:4]
    model = build_model(ModelOptions(model="sparse-logistic"), (3, 2), 3, 0, "sparse", 30)
    weight = next(model.parameters())
    torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    dense = torch.zeros(4, 30).scatter_(1, inputs[:, :, 0].long(), inputs[:, :, 1])
    torch.testing.assert_close(model(inputs), dense @ weight)
    model(inputs).sum().backward()
    assert weight.grad is not None
    assert set(weight.grad.coalesce().indices()[0].tolist()) == set(inputs[:, :, 0].long().flatten().tolist())
    torch.testing.assert_close(weight.grad.to_dense(), dense.sum(0)[:, None].expand(30, 3))
    assert model(inputs[:0]).shape == (0, 3)
    assert model.double()(inputs).dtype == torch.float64


def test_the_default() -> None:
    dataset = load_dataset(DataOptions(dataset="synthetic-sparse"), 0)
    assert (len(dataset.train) + len(dataset.test), dataset.sparse_features, dataset.input_shape) == (
        20000,
        1000,
        (10, 2),
    )


@pytest.mark.parametrize("specification", ["", "10", "10,5", "1,5,2", "10,0,2", "10,5,1", "10,5,0", "10,16777217,2"])
def test_a_malformed_specification(specification: str) -> None:
    with pytest.raises(ConfigError, match=rf"--dataset synthetic-sparse:{specification}: expected synthetic-sparse:SA"):
        load(specification)


def test_too_large_for_memory() -> None:
    with pytest.raises(ConfigError, match=r"synthetic-sparse:999999999999,999999,2 --density 1: cannot be made"):
        load("999999999999,999999,2", 1.0)


def test_pairs_are_not_standardised() -> None:
    with pytest.raises(ConfigError, match=r"--standardize .*: inputs are pairs of index and value; allowed is no"):
        load(standardize=True)
    assert load(standardize=False).with_splits(lambda split: split).sparse_features == 100


@pytest.mark.parametrize("model", ["mlp", "linear", "logistic", "cnn", "chargpt"])
def test_other_models_refuse_sparse_samples(model: str) -> None:
    problem = f"--model {model} takes .*, but the --dataset gives sparse samples of the shape"
    with pytest.raises(ConfigError, match=problem):
        build_model(ModelOptions(model=model), (5, 2), 2, 0, "sparse", 100)


@pytest.mark.parametrize(("kind", "shape"), [("features", (1, 8, 8)), ("features", (5, 2)), ("tokens", (5,))])
def test_the_sparse_model_refuses_other_samples(kind: str, shape: tuple[int, ...]) -> None:
    problem = rf"--model sparse-logistic takes sparse samples \(synthetic-sparse, .*, but the --dataset gives {kind}"
    with pytest.raises(ConfigError, match=problem):
        build_model(ModelOptions(model="sparse-logistic"), shape, 2, 0, kind)  # type: ignore[arg-type]


def test_the_sparse_model_needs_classes() -> None:
    with pytest.raises(ConfigError, match="--model sparse-logistic needs classes"):
        build_model(ModelOptions(model="sparse-logistic"), (5, 2), None, 0, "features")
