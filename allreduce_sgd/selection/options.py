"""The options of early stopping and of averages of weights."""

from dataclasses import dataclass

from allreduce_sgd.options import option

__all__ = ["SelectionOptions"]


@dataclass(frozen=True)
class SelectionOptions:
    patience: int | None = option(
        None,
        "stop after so many evaluations in a row without a lower validation loss (early stopping; needs "
        "--validation-fraction); the model with the lowest is then the final one, and kept as best.pt",
        minimum=1,
    )
    min_delta: float = option(
        0.0, "by how much the validation loss must have become lower for --patience to start anew", minimum=0
    )
    ema: float | None = option(
        None,
        "evaluate, and end with, the exponential moving average of the parameters over the steps, of this decay, such "
        "as 0.999",
        above=0,
        maximum=1,
    )
    swa: float | None = option(
        None,
        "evaluate, and end with, the equal average of the parameters at the ends of the epochs from this fraction of "
        "the run on, such as 0.75 (stochastic weight averaging)",
        minimum=0,
        maximum=1,
    )
