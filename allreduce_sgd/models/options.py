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
        "sparse-logistic (synthetic-sparse, text-folder, csv with texts; with sparse gradients); or module:function of "
        "your own, called with those of input_shape, classes and seed that it names",
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
    label_smoothing: float = option(
        0.0,
        "train towards (1 - E) times the one-hot distribution of the label plus E / C for each of C classes, by "
        "cross-entropy, nll, kl or logistic; the test loss is not smoothed",
        minimum=0.0,
        maximum=0.99,
        metavar="E",
    )
    class_weights: str | None = option(
        None,
        "weight of each class in the training loss, as in 1,2.5,1; or balanced, in inverse proportion to how often the "
        "training set has it. The loss is divided by the mean weight over the training set (torch: over the batch); "
        "the test loss is not weighted",
        metavar="W,W,...",
    )
    dropout: float = option(
        0.0,
        "probability of dropping an activation while training: of hidden layers of mlp and chargpt, before the fully "
        "connected layers of cnn",
        minimum=0.0,
        maximum=0.95,
    )
    batch_norm: bool = option(
        False,
        "batch normalisation after each hidden layer of mlp and cnn, of each rank's own samples unless "
        "--sync-batch-norm; resnet20 and resnet18 always have it",
    )
