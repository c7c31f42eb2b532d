"""Adam against SGD: Wilson et al., "The marginal value of adaptive gradient methods", 2017 (arXiv 1705.08292).

Unlike there, learning rates are not tuned: Adam has its default, SGD one that is common for such networks.
"""

from collections.abc import Mapping

from benchmarks.course.runs import Job
from benchmarks.recipes.measures import final, over_first_epoch, over_last_epoch
from benchmarks.recipes.recipe import Claim, Curve, Recipe, Scale, Side, claims_of, curves_of

__all__ = ["GENERALISATION"]

_SGD, _ADAM = "SGD, momentum 0.9", "Adam"
_FIRST = over_first_epoch("training loss of the first epoch", "loss")
_LAST = over_last_epoch("training loss of the last epoch", "loss")
_ACCURACY = final("test accuracy", "test_accuracy")


def _cases(scale: Scale) -> Mapping[str, Job]:
    return {
        _SGD: Job(64, (("optimizer", "sgd"), ("lr", 0.01), ("momentum", 0.9))),
        _ADAM: Job(64, (("optimizer", "adam"), ("lr", 0.001))),
    }


GENERALISATION = Recipe(
    title="Adam against SGD: training and generalisation",
    expect=(
        "Adam divides each gradient by its usual size, so it is fast from the start without a tuned learning rate. "
        "Where a network can fit all samples there are many minima, and what an optimizer finds differs: Wilson et "
        "al. saw adaptive methods train faster and yet do worse on the test set than SGD with momentum. On networks "
        "and data as small as these the difference may well be too small to be seen."
    ),
    scales={"quick": Scale(15), "digits": Scale(60), "": Scale(20)},
    cases=_cases,
    figures=curves_of(
        Curve("train_loss", "Training loss", "train", "loss", "training loss, mean of an epoch (nats)", y_log=True),
        Curve("test_accuracy", "Test accuracy", "evaluation", "test_accuracy", "test accuracy"),
    ),
    findings=claims_of(
        Claim("Adam's training loss is lower in the first epoch", Side(_ADAM, _FIRST), Side(_SGD, _FIRST)),
        Claim("Adam's training loss is lower in the last epoch", Side(_ADAM, _LAST), Side(_SGD, _LAST)),
        Claim("SGD's test accuracy is higher", Side(_ADAM, _ACCURACY), Side(_SGD, _ACCURACY)),
    ),
)
