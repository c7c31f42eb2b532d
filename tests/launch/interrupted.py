"""A model whose steps take long until its SLURM job has been requeued, so that a test can interrupt it."""

import os

from torch import nn

from tests.parts import slow_model


def model(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    if "SLURM_RESTART_COUNT" in os.environ:
        os.environ["TEST_STEP_SECONDS"] = "0"
    return slow_model(input_shape, classes)
