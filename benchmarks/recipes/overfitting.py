"""Overfitting of few samples, with and without L2: Krogh and Hertz, "A simple weight decay can improve
generalization", NIPS 1991.
"""

from collections.abc import Mapping

from benchmarks.course.runs import Job
from benchmarks.recipes.measures import last, lowest, over_last_epoch
from benchmarks.recipes.recipe import Claim, Curve, Recipe, Scale, Side, claims_of, curves_of

__all__ = ["OVERFITTING"]

_PLAIN, _DECAYED = "without L2", "with L2"
_DECAY = 0.01
_TEST_LOSS = last("test loss at the end", "test_loss")
_LOWEST = lowest("lowest test loss", "test_loss")
_TRAIN_LOSS = over_last_epoch("training loss of the last epoch", "loss")


def _cases(scale: Scale) -> Mapping[str, Job]:
    shared = (("optimizer", "sgd"), ("lr", 0.02), ("momentum", 0.9), ("train-samples", scale.train_samples or 1000))
    return {
        _PLAIN: Job(16, (*shared, ("weight-decay", 0.0))),
        _DECAYED: Job(16, (*shared, ("weight-decay", _DECAY))),
    }


OVERFITTING = Recipe(
    title="Overfitting with and without L2",
    expect=(
        "A network with far more weights than samples can learn every sample by heart. The training loss then goes to "
        "0, and to get there the weights grow and the network becomes ever surer of itself, also where it is wrong: "
        "after a while the test loss rises, although fewer and fewer training samples are wrong. L2 adds λ|w|²/2 to "
        "the loss, so that large weights must pay for themselves: the training loss stays higher, and the test loss "
        "ends lower and does not rise."
    ),
    scales={"quick": Scale(60, 100), "digits": Scale(200, 100), "": Scale(100, 1000)},
    cases=_cases,
    figures=curves_of(
        Curve("test_loss", "Test loss", "evaluation", "test_loss", "test loss (nats)"),
        Curve("train_loss", "Training loss", "train", "loss", "training loss, mean of an epoch (nats)", y_log=True),
    ),
    findings=claims_of(
        Claim(
            "Without L2 the test loss rises by 5 % and more over its lowest",
            Side(_PLAIN, _LOWEST, factor=1.05),
            Side(_PLAIN, _TEST_LOSS),
            finite=True,
        ),
        Claim("L2 keeps the training loss up", Side(_PLAIN, _TRAIN_LOSS), Side(_DECAYED, _TRAIN_LOSS), finite=True),
        Claim("L2 brings the test loss down", Side(_DECAYED, _TEST_LOSS), Side(_PLAIN, _TEST_LOSS), finite=True),
    ),
)
