"""What each layer of the trainer's models computes and what it sends: `python -m benchmarks.layer_costs`.

A step's gradient is all-reduced, 4 bytes per parameter, whatever the batch; FLOPs grow with the batch. Counted are the
multiplications and additions of convolutions and matrix products, forward and backward, from the shapes that forward
hooks see. A layer with n parameters takes 2 n FLOPs per sample and position forward, and as many backward each for the
gradient by its weights and the one by its inputs, which a first layer need not have. A fully connected layer has one
position, so it does 6 n FLOPs for 4 n bytes, 1.5 FLOPs per byte and sample whatever its width; a convolution does that
at every position of its output. How many bytes per FLOP a machine can hide is its network's rate over its speed.

Not counted are biases, normalisation, embeddings and other work by element, which some kinds of layer consist of, nor
attention's products, which have no parameters.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.options import ModelOptions
from allreduce_sgd.models.registry import build_model
from benchmarks.arguments import Parser, check_plotting, check_writable, names, positive_int
from benchmarks.record import write_record
from benchmarks.table import format_number, format_table

__all__ = ["costs_of", "main", "rows_of", "summary", "table"]

_CLASSES = 10
_CHARACTERS = 65
_IMAGE = (3, 32, 32)
# The shape of a sample: of Fashion-MNIST, of CIFAR-10, of a block of text.
_SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"linear": (1, 28, 28), "mlp": (1, 28, 28), "cnn": _IMAGE, "resnet20": _IMAGE, "resnet18": _IMAGE, "chargpt": (64,)}
)
_CONVOLUTION = "convolution"
_FULLY_CONNECTED = "fully connected"
_OTHER = "other"
_BATCH_SIZE = 32
_SAMPLES_SEEN = 2


def main(arguments: Sequence[str]) -> int:
    """Count, print and draw, and return the exit status: 0, or 2 for bad arguments."""
    try:
        options = _parse(arguments)
    except ConfigError as problem:
        print(f"layer_costs: error: {problem}", file=sys.stderr, flush=True)
        return 2
    rows = [row for model in options.models for row in rows_of(model, options.batch_size)]
    print(f"{table(rows)}\n\n{summary(rows)}", flush=True)
    if options.plot is not None:
        from benchmarks.layer_costs_plot import draw

        draw(rows, options.plot)
    if options.json is not None:
        write_record(options.json, "layer_costs", arguments, rows)
    return 0


def rows_of(model: str, batch_size: int = _BATCH_SIZE) -> list[dict[str, Any]]:
    """Return a row for each layer with parameters of the trainer's model of that name, for data of its usual shape.

    "bytes" are those of the gradient, once a step; "flops" are per sample, None where they are not counted.
    """
    shape = _SHAPES[model]
    tokens = model == "chargpt"
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        classes, kind = (_CHARACTERS, "tokens") if tokens else (_CLASSES, "features")
        network = build_model(ModelOptions(model=model), shape, classes, 0, kind)  # type: ignore[arg-type]
        inputs = torch.randint(_CHARACTERS, (_SAMPLES_SEEN, *shape)) if tokens else torch.randn(_SAMPLES_SEEN, *shape)
    return [{"model": model, "batch_size": batch_size, **row} for row in costs_of(network, inputs)]


def costs_of(network: nn.Module, inputs: Tensor) -> list[dict[str, Any]]:
    """Return a row for each layer with parameters of its own, given a batch of inputs; the model is left as it was."""
    flops: Counter[str] = Counter()
    layers = {name: layer for name, layer in network.named_modules() if any(True for _ in layer.parameters(False))}

    def count(name: str, layer: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        products = _products(layer, result)
        # Forward and for the weights, and where something before it learns, for the inputs.
        flops[name] += 2 * products * (3 if given[0].requires_grad else 2) // len(inputs)

    hooks = [
        layer.register_forward_hook(lambda layer, given, result, name=name: count(name, layer, given, result))
        for name, layer in layers.items()
        if _kind(layer) != _OTHER
    ]
    try:
        # Statistics of batch normalisation would change in training mode; shapes do not.
        was_training = network.training
        network.eval()(inputs)
        network.train(was_training)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        {
            "layer": name or type(layer).__name__.lower(),
            "kind": _kind(layer),
            "shape": _shape(layer),
            "parameters": sum(parameter.numel() for parameter in layer.parameters(False)),
            "bytes": sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters(False)),
            "flops": flops.get(name),
        }
        for name, layer in layers.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    batch_size = rows[0]["batch_size"]
    header = [
        "model",
        "layer",
        "kind",
        "shape",
        "parameters",
        "kB of gradient",
        "kFLOP per sample",
        f"FLOP per byte, batch {batch_size}",
    ]
    lines = [
        [
            row["model"],
            row["layer"],
            row["kind"],
            row["shape"],
            f"{row['parameters']:,}",
            format_number(row["bytes"] / 1e3),
            format_number(None if row["flops"] is None else row["flops"] / 1e3),
            format_number(None if row["flops"] is None else batch_size * row["flops"] / row["bytes"]),
        ]
        for row in rows
    ]
    return format_table(header, lines, text_columns=4)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what the rows show: which share of bytes and FLOPs is that of convolutions, a sentence per model."""
    sentences = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        totals = {key: sum(row[key] or 0 for row in own) for key in ("bytes", "flops")}
        shares = [
            f"{kind} layers send {_share(own, kind, 'bytes', totals)} of its bytes "
            f"and do {_share(own, kind, 'flops', totals)} of its FLOPs"
            for kind in (_CONVOLUTION, _FULLY_CONNECTED)
            if any(row["kind"] == kind for row in own)
        ]
        per_byte = own[0]["batch_size"] * totals["flops"] / totals["bytes"]
        whole = f"{format_number(per_byte)} FLOPs per byte at batch {own[0]['batch_size']}"
        sentences.append(f"{model}: {whole}; {', '.join(shares)}.")
    return "\n".join(sentences)


def _share(rows: Sequence[Mapping[str, Any]], kind: str, key: str, totals: Mapping[str, int]) -> str:
    percent = 100 * sum(row[key] or 0 for row in rows if row["kind"] == kind) / totals[key]
    return f"{percent:.1f} %" if percent >= 0.1 else "less than 0.1 %"


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d):
        return _CONVOLUTION
    return _FULLY_CONNECTED if isinstance(layer, nn.Linear) else _OTHER


def _shape(layer: nn.Module) -> str:
    if isinstance(layer, nn.Conv2d):
        return f"{'×'.join(map(str, layer.kernel_size))}, {layer.in_channels}→{layer.out_channels}"
    return f"{layer.in_features}→{layer.out_features}" if isinstance(layer, nn.Linear) else ""


def _products(layer: nn.Module, result: Tensor) -> int:
    """Return the multiplications of the layer's forward pass over the whole batch."""
    if isinstance(layer, nn.Conv2d):
        return result.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return result.numel() * layer.in_features


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("layer_costs", "Count what each layer of a model computes and sends in a step; nothing is timed.")
    add = parser.add_argument
    add("--models", default="mlp,cnn,resnet20", metavar="NAMES", help=f"of {', '.join(_SHAPES)}")
    add("--batch-size", type=positive_int, default=_BATCH_SIZE, metavar="N", help="samples per rank and step")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    add("--plot", type=Path, metavar="FILE", help="draw the picture here, a .png, .svg or .pdf")
    options = parser.parse_args(arguments)
    options.models = names("--models", options.models, tuple(_SHAPES))
    check_writable("--json", options.json)
    check_writable("--plot", options.plot)
    check_plotting("--plot", options.plot)
    if options.plot is not None and options.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {options.plot}: name a file that ends in .png, .svg or .pdf")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
