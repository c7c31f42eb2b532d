import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from allreduce_sgd.models.cnn import cnn
from allreduce_sgd.models.mlp import mlp
from allreduce_sgd.models.resnet import resnet18, resnet20
from benchmarks.layer_costs import costs_of, main, rows_of, summary, table
from benchmarks.layer_costs_plot import draw

IMAGE = (3, 32, 32)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (mlp((784,), 10, (512, 512), 0.0), (784,)),
        (cnn(IMAGE, 10), IMAGE),
        (resnet20(IMAGE, 10), IMAGE),
        (resnet18((1, 8, 8), 10), (1, 8, 8)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, dilation=2), nn.Conv2d(8, 6, (1, 3), stride=2, padding=1)), (4, 9, 9)),
        (nn.Linear(6, 5), (7, 6)),
    ],
)
def test_flops_are_those_that_torch_counts(model: nn.Module, shape: tuple[int, ...]) -> None:
    samples = 3
    inputs = torch.randn(samples, *shape)
    rows = costs_of(model, inputs)
    counter = FlopCounterMode(display=False)
    with counter:
        model(inputs).sum().backward()
    assert samples * sum(row["flops"] or 0 for row in rows) == counter.get_total_flops()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(row["parameters"] for row in rows) == parameters
    assert sum(row["bytes"] for row in rows) == 4 * parameters


def test_each_layer_as_computed_by_hand() -> None:
    first, second, last = rows_of("mlp")
    assert (first["bytes"], first["flops"]) == (4 * (784 * 512 + 512), 2 * 2 * 784 * 512)
    # Only the first layer needs no gradient by its inputs.
    assert (second["bytes"], second["flops"]) == (4 * (512 * 512 + 512), 3 * 2 * 512 * 512)
    assert (last["kind"], last["shape"]) == ("fully connected", "512→10")
    convolution = rows_of("cnn")[1]
    assert (convolution["kind"], convolution["shape"]) == ("convolution", "5×5, 32→32")
    assert convolution["flops"] == 3 * 2 * 16 * 16 * 32 * 32 * 25


def test_counting_leaves_the_model_as_it_was() -> None:
    model = resnet20(IMAGE, 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    costs_of(model, torch.randn(2, *IMAGE))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("model", ["linear", "resnet20", "chargpt"])
def test_layers_without_products_are_there_without_flops(model: str) -> None:
    rows = rows_of(model, batch_size=4)
    assert {row["flops"] is None for row in rows if row["kind"] == "other"} <= {True}
    assert all(row["flops"] > 0 for row in rows if row["kind"] != "other")
    assert len(table(rows).splitlines()) == len(rows) + 2
    assert summary(rows).startswith(f"{model}: ")


def test_the_summary_tells_the_shares_of_convolutions() -> None:
    common = {"model": "tiny", "batch_size": 8, "shape": ""}
    rows = [
        {**common, "layer": "0", "kind": "convolution", "parameters": 25, "bytes": 100, "flops": 900},
        {**common, "layer": "1", "kind": "fully connected", "parameters": 75, "bytes": 300, "flops": 100},
    ]
    assert summary(rows) == (
        "tiny: 20.0 FLOPs per byte at batch 8; convolution layers send 25.0 % of its bytes and do 90.0 % of its FLOPs, "
        "fully connected layers send 75.0 % of its bytes and do 10.0 % of its FLOPs."
    )


def test_the_program_writes_its_record_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, plot = tmp_path / "costs.json", tmp_path / "costs.png"
    assert main(["--models", "cnn,mlp", "--batch-size", "16", "--json", str(record), "--plot", str(plot)]) == 0
    assert "FLOP per byte, batch 16" in capsys.readouterr().out
    written = json.loads(record.read_text())
    assert written["benchmark"] == "layer_costs"
    assert [row["model"] for row in written["rows"]] == 5 * ["cnn"] + 3 * ["mlp"]
    assert imread(plot).shape[1] > 1000
    draw(written["rows"], tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == plot.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "cnn,alexnet"], "--models: unknown value 'alexnet'"),
        (["--batch-size", "0"], "--batch-size: '0' is not a whole number"),
        (["--plot", "missing/costs.png"], "--plot missing/costs.png: name a file in a folder that exists"),
        (["--plot", "costs.txt"], "--plot costs.txt: name a file that ends in"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"layer_costs: error: {said}")
    assert len(error.splitlines()) == 1
