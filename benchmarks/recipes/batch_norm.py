"""What batch normalisation changes: Ioffe and Szegedy 2015 (arXiv 1502.03167), Santurkar et al. 2018 (arXiv
1805.11604), and Bjorck et al. 2018 (arXiv 1806.02375), by whom it is the larger learning rates that make it faster.
"""

from collections.abc import Mapping

from benchmarks.course.runs import Job
from benchmarks.recipes.measures import final, over_last_epoch
from benchmarks.recipes.recipe import Claim, Curve, Recipe, Scale, Side, claims_of, curves_of

__all__ = ["BATCH_NORM"]

_DEEP = ",".join(["64"] * 8)
_SMALL, _LARGE = 0.01, 0.5
_TRAIN_LOSS = over_last_epoch("training loss of the last epoch", "loss")
_ACCURACY = final("test accuracy", "test_accuracy")


def _label(normalised: bool, lr: float) -> str:
    return f"{'batch norm' if normalised else 'plain'}, η = {lr:g}"


def _cases(scale: Scale) -> Mapping[str, Job]:
    return {
        _label(normalised, lr): Job(
            64, (("optimizer", "sgd"), ("lr", lr), ("momentum", 0.0), ("batch-norm", normalised))
        )
        for lr in (_SMALL, _LARGE)
        for normalised in (False, True)
    }


BATCH_NORM = Recipe(
    title="Batch normalisation in a deep, narrow network",
    expect=(
        "Through eight layers a step that is too long for one of them upsets all that follow, so that plain SGD has to "
        "be content with a small learning rate. Batch normalisation sets every layer's outputs to mean 0 and deviation "
        "1 over the mini-batch, whatever the scale of those below, and so takes steps at which plain layers stand "
        "still or diverge. There lies its gain: with the small rate, which plain layers take well where they were "
        "initialised well, it has none."
    ),
    scales={
        "quick": Scale(6, hidden=_DEEP),
        "digits": Scale(20, hidden=_DEEP),
        "": Scale(5, hidden=_DEEP),
    },
    cases=_cases,
    figures=curves_of(
        Curve("train_loss", "Training loss", "train", "loss", "training loss, mean of an epoch (nats)", y_log=True),
        Curve("test_accuracy", "Test accuracy", "evaluation", "test_accuracy", "test accuracy"),
    ),
    findings=claims_of(
        Claim(
            "With the large rate batch norm trains better",
            Side(_label(False, _LARGE), _ACCURACY),
            Side(_label(True, _LARGE), _ACCURACY),
        ),
        Claim(
            "Batch norm does better with the large rate than plain layers with the small one",
            Side(_label(False, _SMALL), _ACCURACY),
            Side(_label(True, _LARGE), _ACCURACY),
        ),
        Claim(
            "With the small rate plain layers get further down",
            Side(_label(False, _SMALL), _TRAIN_LOSS),
            Side(_label(True, _SMALL), _TRAIN_LOSS),
        ),
    ),
)
