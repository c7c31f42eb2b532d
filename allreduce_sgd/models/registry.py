"""Which name means which model, and whether it suits the data."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from torch import nn

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.models.chargpt import chargpt
from allreduce_sgd.models.cnn import cnn
from allreduce_sgd.models.linear import linear
from allreduce_sgd.models.losses import output_width
from allreduce_sgd.models.mlp import mlp, parse_hidden
from allreduce_sgd.models.options import ModelOptions
from allreduce_sgd.models.resnet import resnet18, resnet20
from allreduce_sgd.models.sparse_logistic import SparseLogistic
from allreduce_sgd.user_code import call_with_named, load_function

__all__ = ["build_model"]

_FLAT = ("linear", "logistic", "perceptron", "mlp")
_RESNETS: Mapping[str, Callable[[tuple[int, ...], int], nn.Module]] = MappingProxyType(
    {"resnet20": resnet20, "resnet18": resnet18}
)
_IMAGE = ("cnn", *_RESNETS)
_TEXT = "chargpt"
_SPARSE = "sparse-logistic"
_CHOICES = (*_FLAT, *_IMAGE, _TEXT, _SPARSE, "module:function")
_KINDS = MappingProxyType({None: "inputs", "features": "features", "tokens": "tokens", "sparse": "sparse samples"})
_WITH_DROPOUT = ("mlp", "cnn", _TEXT)
_WITH_BATCH_NORM = ("mlp", "cnn")


def build_model(
    options: ModelOptions,
    input_shape: tuple[int, ...],
    classes: int | None,
    seed: int,
    kind: Literal["features", "tokens", "sparse"] | None = None,
    sparse_features: int | None = None,
) -> nn.Module:
    """The model `options.model` for inputs (n, *input_shape) and `classes` (None: a regression), not yet trained.

    Its weights come from torch's global generator, which the caller seeds; `seed` goes to a function of the user's.
    `kind` is the data set's (`Dataset.kind`); None leaves it unchecked. `sparse_features` is its number of features
    where samples are sparse.

    Raises:
        ConfigError: the name is unknown, the model does not suit the data, or the user's function fails.
    """
    name = options.model.lower()
    if options.dropout and name not in _WITH_DROPOUT:
        raise ConfigError(
            f"--dropout {options.dropout} with --model {options.model}: it has none; only {', '.join(_WITH_DROPOUT)} do"
        )
    if options.batch_norm and name not in _WITH_BATCH_NORM:
        raise ConfigError(
            f"--batch-norm with --model {options.model}: it is switched in {' and '.join(_WITH_BATCH_NORM)} only"
        )
    if ":" in options.model:
        return _users_model(options.model, input_shape, classes, seed)
    if name not in _CHOICES:
        raise ConfigError(f"--model {options.model}: unknown; allowed are {', '.join(_CHOICES)}")
    outputs = output_width(options.loss, name, classes)
    if name == _TEXT:
        if kind == "features" or len(input_shape) != 1 or classes is None:
            raise _unsuited(options, "text (text:FILE)", input_shape, kind)
        return chargpt(input_shape[0], classes, outputs, options.dropout)
    if name == _SPARSE:
        if sparse_features is None:
            raise _unsuited(options, "sparse samples (synthetic-sparse, text-folder, csv)", input_shape, kind)
        return SparseLogistic(sparse_features, outputs)
    if kind == "tokens":
        raise _unsuited(options, "features, not text", input_shape, kind)
    if kind == "sparse":
        raise _unsuited(options, "features, not sparse samples (--model sparse-logistic does)", input_shape, kind)
    if name in _IMAGE:
        if len(input_shape) != 3:
            raise _unsuited(options, "images (channels, height, width)", input_shape, kind)
        if name == "cnn":
            return cnn(input_shape, outputs, options.dropout, options.batch_norm)
        return _RESNETS[name](input_shape, outputs)
    if name == "mlp":
        return mlp(input_shape, outputs, parse_hidden(options.hidden), options.dropout, options.batch_norm)
    return linear(input_shape, outputs)


def _unsuited(options: ModelOptions, wants: str, input_shape: tuple[int, ...], kind: str | None) -> ConfigError:
    return ConfigError(
        f"--model {options.model} takes {wants}, but the --dataset gives {_KINDS[kind]} of the shape {input_shape}"
    )


def _users_model(reference: str, input_shape: tuple[int, ...], classes: int | None, seed: int) -> nn.Module:
    function = load_function(reference, "--model")
    available = {"input_shape": input_shape, "classes": classes, "seed": seed}
    model = call_with_named(function, available, f"--model {reference}")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"--model {reference}: returned a {type(model).__name__}; expected a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"--model {reference}: the model has no parameters to train; at least one is needed")
    return model
