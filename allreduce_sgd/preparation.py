"""From the configuration to what a run works on: the data, the model, and how long it lasts.

Whatever can fail through bad input runs under `Topology.agree`, so that a mistake seen by one rank ends all of them.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allreduce_sgd.checks import (
    check_fit,
    check_same_data,
    check_selection,
    check_shares,
    check_strategy,
    global_batch_size,
    period_of,
)
from allreduce_sgd.config import Config
from allreduce_sgd.data.fetch import fetch, missing_files
from allreduce_sgd.data.files import data_folder
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.sampling import Sampler, build_sampler
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.feed import loss_for
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.models.registry import build_model
from allreduce_sgd.probes.gradient_check import check_gradients
from allreduce_sgd.strategies.period import Period
from allreduce_sgd.topology import Topology

__all__ = ["Work", "prepare"]

_DOWNLOAD_SECONDS = 30.0
# For the other ranks, while one downloads: hours on a slow line, but not for ever.
_DOWNLOAD_WAIT_SECONDS = 6 * 3600.0


@dataclass(frozen=True)
class Work:
    """What every rank of a run has alike.

    A step learns from `batch` samples of all ranks; further `predicted` ones are only predicted (method dmb).
    """

    device: torch.device
    dataset: Dataset
    loss: Loss
    model: nn.Module
    sampler: Sampler
    total_steps: int
    batch: int
    predicted: int
    period: Period
    gradient_check: str | None
    """What --check-gradients found, None where it was not asked for."""


def prepare(topology: Topology, config: Config, saved: dict[str, Any], workers: int) -> Work:
    """Load and build what is trained, and check that it fits together, for so many ranks that train.

    `saved` is what a checkpoint to resume from has, empty without one. All ranks must call. Raises ConfigError.
    """
    training = config.training
    torch.set_num_threads(training.threads or topology.threads_per_rank())
    device = topology.agree(lambda: topology.choose_device(training.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _download(topology, config)
    dataset = topology.agree(lambda: load_dataset(config.data, training.seed))
    check_same_data(topology, dataset)
    batch = topology.agree(lambda: global_batch_size(config, workers, dataset, saved))
    predicted = int(saved["predicted"]) if saved else config.strategy.predicted(workers, batch)
    sampler = build_sampler(config.data.sampling, len(dataset.train), batch + predicted, training.seed)
    total_steps = training.steps or (training.epochs or 20) * sampler.steps_per_epoch
    topology.agree(lambda: check_shares(config, workers, batch, sampler, total_steps))
    topology.agree(lambda: check_selection(config, total_steps, sampler.steps_per_epoch))
    torch.manual_seed(training.seed)
    loss = topology.agree(lambda: loss_for(config.model, dataset))
    model = topology.agree(
        lambda: build_model(
            config.model,
            dataset.input_shape,
            dataset.classes,
            training.seed,
            dataset.kind,
            dataset.sparse_features,
        )
    ).to(device)
    if topology.rank > 0:
        # Rank 0 goes on with the generator that built the model, as a serial program does; the others draw their own.
        torch.manual_seed(training.seed + 1_000_003 * topology.rank)
    topology.agree(lambda: check_fit(model, loss, dataset, device))
    topology.agree(lambda: check_strategy(config, topology.size, model))
    period = topology.agree(lambda: period_of(config, total_steps, sampler.steps_per_epoch))
    elements, told = config.probes.check_gradients, None
    if elements is not None:
        told = check_gradients(topology, model, loss, dataset, device, elements, training.seed)
    return Work(device, dataset, loss, model, sampler, total_steps, batch, predicted, period, told)


def _download(topology: Topology, config: Config) -> None:
    """Have one rank of each node fetch the data set's missing files, while the others wait."""
    missing = topology.agree(lambda: missing_files(config.data))
    if any(topology.gather_all(bool(missing))):
        leader = topology.local_rank == 0

        def fetch_missing() -> None:
            if leader and missing:
                show = topology.rank == 0 and sys.stderr.isatty()
                fetch(missing, data_folder(config.data), show, _DOWNLOAD_SECONDS)

        topology.agree(fetch_missing, _DOWNLOAD_WAIT_SECONDS)
