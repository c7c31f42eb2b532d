"""The model that a run keeps while training goes on: rank 0 holds it in memory, and writes it to a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allreduce_sgd.checkpoint import save_model
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.gradients.replicate import broadcast_tensors

__all__ = ["KeptModel"]


class KeptModel:
    """A copy of a model's parameters and buffers. `file` is where it is written each time, None for nowhere."""

    def __init__(self, comm: Communicator, file: Path | None) -> None:
        self._comm = comm
        self._file = file
        self._values: dict[str, Any] = {}

    def keep(self, model: nn.Module, facts: Mapping[str, Any]) -> None:
        """Copy `model`, equal on all ranks, in place of the one before; the file has `facts` beside it.

        Raises OutputError where it cannot be written.
        """
        if self._comm.rank == 0:
            self._values = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            if self._file is not None:
                save_model(self._file, self._values, facts)

    def install(self, model: nn.Module) -> None:
        """Make `model` the one kept, in memory of its own. All ranks must call; training must have ended."""
        with torch.no_grad():
            for parameter in model.parameters():
                # Ranks may share the memory that it is in, and have other models there.
                parameter.data = parameter.data.clone()
        if self._comm.rank == 0:
            model.load_state_dict(self._values)
        broadcast_tensors([*model.parameters(), *model.buffers()], self._comm)

    def state_dict(self) -> dict[str, Any]:
        """Return the model; on rank 0 only."""
        return self._values

    def load_state_dict(self, values: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Take up the model of a checkpoint, and write it: a file that is there may be of a later step."""
        if self._comm.rank == 0 and values:
            self._values = dict(values)
            if self._file is not None:
                save_model(self._file, self._values, facts)
