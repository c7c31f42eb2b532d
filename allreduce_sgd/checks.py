"""What can be wrong with a run once its ranks, its data and its model are known, told in one line each."""

from typing import Any

import torch
from torch import nn

from allreduce_sgd.config import Config
from allreduce_sgd.data.sampling import Sampler
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.errors import ConfigError, counted
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.optim.build import build_optimizer
from allreduce_sgd.optim.schedule import factor
from allreduce_sgd.strategies.build import check_optimizer
from allreduce_sgd.strategies.period import Period, build_period
from allreduce_sgd.strategies.server.build import check_served
from allreduce_sgd.strategies.server.roles import server_count
from allreduce_sgd.topology import Topology

__all__ = [
    "check_fit",
    "check_same_configuration",
    "check_shares",
    "check_strategy",
    "count_workers",
    "global_batch_size",
    "period_of",
]


def check_same_configuration(topology: Topology, config: Config) -> None:
    """Refuse to train where ranks were given different flags or files."""
    views = topology.gather_all(config.flat())
    for rank, theirs in enumerate(views):
        for name, value in theirs.items():
            if value != views[0][name]:
                error = ConfigError(f"--{name}: rank 0 has {views[0][name]!r}, but rank {rank} has {value!r}")
                error.rank = 0
                raise error


def count_workers(config: Config, ranks: int) -> int:
    """Return how many of the ranks train; the others serve parameters."""
    options = config.strategy
    workers = ranks - server_count(options, ranks) if options.served else ranks
    if options.slow_rank is not None and options.slow_rank[0] >= workers:
        raise ConfigError(f"--straggler {options.straggler}: the ranks that train are 0 to {workers - 1}")
    return workers


def check_fit(model: nn.Module, loss: Loss, dataset: Dataset, device: torch.device) -> None:
    """Raise ConfigError if the model cannot take the data set's samples or the loss not its outputs."""
    inputs, targets = dataset.train.batch(torch.arange(min(2, len(dataset.train))))
    model.eval()
    try:
        with torch.no_grad():
            loss(model(inputs.to(device)), targets.to(device))
    except (RuntimeError, TypeError, ValueError, IndexError) as problem:
        why = " ".join(str(problem).split())
        raise ConfigError(f"--model: it cannot take the samples of --dataset {dataset.name}: {why}") from problem
    finally:
        model.train()


def global_batch_size(config: Config, workers: int, dataset: Dataset, saved: dict[str, Any]) -> int:
    """Return the samples of a step's gradients, of all ranks that train."""
    samples, options = len(dataset.train), config.training
    if workers > samples:
        raise ConfigError(f"--dataset {dataset.name}: {workers} ranks share {samples} training samples; start fewer")
    if saved:
        return int(saved["global_batch_size"])
    if options.full_batch:
        return samples
    if options.global_batch_size is not None:
        flag, size = f"--global-batch-size {options.global_batch_size}", options.global_batch_size
    else:
        per_rank = options.batch_size or 32
        flag, size = f"--batch-size {per_rank}", per_rank * workers * options.accumulate
    if size > samples:
        raise ConfigError(
            f"{flag}: the mini-batch of {workers} ranks has {size} samples, more than the {samples} training "
            f"samples of {dataset.name}"
        )
    return size


def check_shares(config: Config, workers: int, batch: int, sampler: Sampler, total_steps: int) -> None:
    """Raise ConfigError where ranks would wait for one another a different number of times, or the run is too short.

    `batch`: how many of the sampler's samples a step learns from.
    """
    rounds = config.training.accumulate
    fewest = min(batch, sampler.global_count(sampler.steps_per_epoch - 1))
    if config.gradients.sync_batch_norm and fewest < workers * rounds:
        raise ConfigError(
            f"--sync-batch-norm: the last mini-batch of an epoch has {counted(fewest, 'sample')}, too few for "
            f"{counted(workers, 'rank')} and {counted(rounds, 'round')} of --accumulate; choose another "
            f"--batch-size or --global-batch-size"
        )
    options = config.strategy
    for flag, steps in (("delay", options.late), ("push", options.push), ("fetch", options.fetch)):
        if steps > max(1, total_steps):
            raise ConfigError(
                f"--{flag} {steps}: the run has only {counted(total_steps, 'step')}; choose at most {total_steps}, or "
                f"a longer run"
            )


def check_strategy(config: Config, ranks: int, model: nn.Module) -> None:
    """Raise ConfigError where the strategy cannot train this model with this optimizer on so many ranks."""
    optimizer = build_optimizer(config.optimizer, model.parameters())
    check_optimizer(optimizer, config.strategy, config.gradients, config.training.precision, model)
    if config.strategy.served:
        check_served(config.strategy, config.gradients, config.optimizer, model, ranks, config.compression)


def period_of(config: Config, total_steps: int, steps_per_epoch: int) -> Period:
    """Return when ranks that step alone exchange their models."""
    options = config.optimizer

    def rate(step: int) -> float:
        return factor(options.lr_schedule, step, total_steps, options.warmup_steps)

    return build_period(config.strategy, total_steps, steps_per_epoch, rate)
