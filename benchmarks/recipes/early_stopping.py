"""Early stopping by a validation split: Prechelt, "Early stopping - but when?", 1998."""

from collections.abc import Mapping

from benchmarks.course.runs import Job
from benchmarks.recipes.measures import final
from benchmarks.recipes.recipe import Claim, Curve, Recipe, Scale, Side, claims_of, curves_of

__all__ = ["EARLY_STOPPING"]

_TO_THE_END, _STOPPED = "to the end", "stopped early"
_PATIENCE = 5
_FRACTION = 0.5
"""Of few samples; the loss of a small part of them would be too noisy to judge by."""
_TEST_LOSS = final("test loss of the final model", "test_loss")
_EPOCHS = final("epochs", "epochs")


def _cases(scale: Scale) -> Mapping[str, Job]:
    shared = (
        ("optimizer", "sgd"),
        ("lr", 0.05),
        ("momentum", 0.9),
        ("train-samples", scale.train_samples or 1000),
        ("validation-fraction", _FRACTION),
    )
    return {_TO_THE_END: Job(16, shared), _STOPPED: Job(16, (*shared, ("patience", _PATIENCE)))}


EARLY_STOPPING = Recipe(
    title="Early stopping",
    expect=(
        "Where a network overfits, the best model is one on the way. Some training samples are held out: their loss "
        "tells without touching the test set when the model gets no better. The run that watches it ends after "
        f"{_PATIENCE} evaluations without a new lowest loss, with the model of the lowest: it takes fewer epochs, and "
        "its test loss is lower than that of a run to the end. Both learn from the same samples."
    ),
    scales={"quick": Scale(60, 200), "digits": Scale(200, 200), "": Scale(100, 2000)},
    cases=_cases,
    figures=curves_of(Curve("test_loss", "Test loss", "evaluation", "test_loss", "test loss (nats)")),
    findings=claims_of(
        Claim("It takes half the epochs or fewer", Side(_STOPPED, _EPOCHS), Side(_TO_THE_END, _EPOCHS, factor=0.5)),
        Claim("The test loss is lower", Side(_STOPPED, _TEST_LOSS), Side(_TO_THE_END, _TEST_LOSS), finite=True),
    ),
)
