"""Options of the model and its loss; imports no torch, so that `--help` is quick."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["LOSSES", "ModelOptions"]

LOSSES = ("cross-entropy", "mse", "l1", "nll", "kl", "hinge", "logistic", "perceptron")


@dataclass(frozen=True)
class ModelOptions:
    """Which model to train, and by which loss."""

    model: str = option(
        "mlp",
        "model: linear, logistic, perceptron, mlp (any features); cnn, resnet20, resnet18 (images); chargpt (text); "
        "sparse-logistic (synthetic-sparse, with sparse gradients); or module:function of your own, called with those "
        "of input_shape, classes and seed that it names",
        metavar="NAME",
    )
    hidden: str = option("512,512", "widths of the hidden layers of --model mlp, separated by commas", metavar="WIDTHS")
    loss: str | None = option(
        None,
        "loss, averaged over samples; not set = logistic for --model logistic and sparse-logistic, perceptron for "
        "--model perceptron, else cross-entropy for classes and mse for a regression. With labels, mse and l1 compare "
        "with one-hot vectors",
        choices=LOSSES,
    )
    dropout: float = option(
        0.0, "probability of dropping an activation while training mlp or chargpt", minimum=0.0, maximum=0.95
    )
