"""What can be wrong with a run once its ranks, its data and its model are known, told in one line each."""

import hashlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from allreduce_sgd.config import Config
from allreduce_sgd.data.sampling import Sampler, shares
from allreduce_sgd.data.split import Dataset, MapSplit, Samples
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
    "check_same_code",
    "check_same_configuration",
    "check_same_data",
    "check_selection",
    "check_shares",
    "check_strategy",
    "check_virtual_ranks",
    "count_workers",
    "global_batch_size",
    "period_of",
]


# Enough to tell two files apart, and few enough to cost nothing.
_SAMPLES_COMPARED = 1000
_SUMS_COMPARED = 20
# Numbers of samples, what must be equal, and sums that must be nearly so.
_Data = tuple[list[int], list[str], list[float]]


def check_same_code(topology: Topology) -> None:
    """Refuse to train where ranks run other sources of this package, or another torch. All ranks must call."""
    hashed = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        hashed.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    # Builds of one version for different processors may train together.
    version = torch.__version__.partition("+")[0]
    code = f"torch {version} and allreduce_sgd of {package} (hash {hashed.hexdigest()[:12]})"
    _refuse_different(topology, (version, hashed.hexdigest()), "code", code)


def check_same_data(topology: Topology, dataset: Dataset) -> None:
    """Refuse to train where ranks have loaded other samples. All ranks must call.

    Compared are the numbers of samples and, where these are in memory, shapes, types and up to 1000 of each split,
    evenly spread; a map-style data set may well make each sample anew. Floating numbers may differ a little, since
    processors round differently where data are standardized.
    """
    parts = {"training" if part == "train" else part: split for part, split in dataset.splits.items()}
    digests = [_digest(split) for split in parts.values()]
    sizes = [len(split) for split in parts.values()]
    named = zip(sizes, parts, digests, strict=True)
    told = [f"{size:,} {part} samples{digest.told}" for size, part, digest in named]
    value = (sizes, [digest.exact for digest in digests], [each for digest in digests for each in digest.sums])
    _refuse_different(topology, value, f"--dataset {dataset.name}", " and ".join(told), _alike)


class _Digest(NamedTuple):
    """Of some samples: what must be equal, sums that must be nearly so, and a name for them all."""

    exact: str
    sums: list[float]
    told: str


def _digest(split: Samples) -> _Digest:
    if isinstance(split, MapSplit):
        return _Digest("", [], "")
    chosen = torch.linspace(0, len(split) - 1, min(len(split), _SAMPLES_COMPARED), dtype=torch.float64).long()
    exact, everything = hashlib.sha256(), hashlib.sha256()
    sums: list[float] = []
    for values in split.batch(chosen):
        exact.update(f"{values.dtype} {tuple(values.shape)}".encode())
        flat = values.contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().tobytes()
        everything.update(data)
        if values.is_floating_point():
            # Weighted, so that their order counts.
            weighted = flat.double() * torch.arange(len(flat)).cos()
            sums += [float(part.sum()) for part in weighted.tensor_split(_SUMS_COMPARED)]
            sums.append(float(flat.double().abs().sum()))
        else:
            exact.update(data)
    return _Digest(exact.hexdigest(), sums, f" (hash {everything.hexdigest()[:12]})")


def _alike(ours: _Data, theirs: _Data) -> bool:
    same = ours[:2] == theirs[:2] and len(ours[2]) == len(theirs[2])
    largest = max(map(abs, ours[2]), default=0.0)
    return same and all(abs(one - other) <= 1e-6 * largest for one, other in zip(ours[2], theirs[2], strict=True))


def _refuse_different(
    topology: Topology, value: Any, what: str, description: str, alike: Callable[[Any, Any], bool] = operator.eq
) -> None:
    views = topology.gather_all((value, f"rank {topology.rank} on {topology.host} has {description}"))
    for theirs, told in views:
        if not alike(views[0][0], theirs):
            error = ConfigError(f"{what}: {views[0][1]}, but {told}")
            error.rank = 0
            raise error


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
    check_virtual_ranks(config, workers)
    return workers


def check_virtual_ranks(config: Config, ranks: int) -> None:
    """Raise ConfigError where --virtual-ranks does not fit the ranks or another flag."""
    virtual, gradients = config.strategy.virtual_ranks, config.gradients
    if virtual is None:
        return
    given = f"--virtual-ranks {virtual}"
    if virtual % ranks:
        raise ConfigError(f"{given}: {counted(ranks, 'rank')} cannot share them out; choose a multiple of {ranks}")
    unsuited = {
        "shard-optimizer": (bool(gradients.shard_optimizer), "every rank takes the optimizer's whole step"),
        "compression": (config.compression.compression != "none", "sums of compressed gradients depend on the ranks"),
        "accumulate": (config.training.accumulate > 1, "virtual ranks of a rank follow one another; take more of them"),
        "noise-scale": (config.strategy.noise_scale is not None, "it compares the gradients of the ranks started"),
        "resync-every": (config.strategy.resync_every is not None, "ranks have the same bits anyway"),
        "sync-batch-norm": (gradients.sync_batch_norm, "batches are normalised within a virtual rank"),
        "buffers": (gradients.buffers != "leave", "buffers are averaged over virtual ranks in every step"),
        "static-graph": (gradients.static_graph, "gradients are exchanged after back-propagation anyway"),
    }
    for flag, (clashes, why) in unsuited.items():
        if clashes:
            raise ConfigError(f"--{flag}: it cannot be combined with {given}: {why}")


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
    samples, options, virtual = len(dataset.train), config.training, config.strategy.virtual_ranks
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
        flag, size = f"--batch-size {per_rank}", per_rank * (virtual or workers) * options.accumulate
    if size > samples:
        ranks = f"{workers} ranks" if virtual is None else f"{virtual} virtual ranks"
        raise ConfigError(
            f"{flag}: the mini-batch of {ranks} has {size} samples, more than the {samples} training samples of "
            f"{dataset.name}"
        )
    if virtual is not None and virtual > size:
        raise ConfigError(f"--virtual-ranks {virtual}: a mini-batch has only {size} samples; choose at most {size}")
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
    if config.model.batch_norm and not config.gradients.sync_batch_norm:
        _check_batch_norm(config, workers, batch, sampler)
    options = config.strategy
    for flag, steps in (("delay", options.late), ("push", options.push), ("fetch", options.fetch)):
        if steps > max(1, total_steps):
            raise ConfigError(
                f"--{flag} {steps}: the run has only {counted(total_steps, 'step')}; choose at most {total_steps}, or "
                f"a longer run"
            )


def _check_batch_norm(config: Config, workers: int, batch: int, sampler: Sampler) -> None:
    """Raise ConfigError where a rank would have to normalise a batch of one sample, which has no variance."""
    parts, rounds = config.strategy.virtual_ranks or workers, config.training.accumulate
    for count in (batch, min(batch, sampler.global_count(sampler.steps_per_epoch - 1))):
        sizes = {len(range(each.start, each.stop)) for whole in shares(count, parts) for each in _pieces(whole, rounds)}
        if 1 in sizes:
            raise ConfigError(
                f"--batch-norm: of a mini-batch of {counted(count, 'sample')} a rank takes 1 at a time, which has no "
                "variance; choose another --batch-size or --global-batch-size, or --sync-batch-norm"
            )


def _pieces(whole: slice, rounds: int) -> list[slice]:
    return shares(whole.stop - whole.start, rounds)


def check_selection(config: Config, total_steps: int, steps_per_epoch: int) -> None:
    """Raise ConfigError where the run ends no epoch whose model --swa could average."""
    swa, last_end = config.selection.swa, total_steps - total_steps % steps_per_epoch
    if swa is None or 0 < last_end >= swa * total_steps:
        return
    flag, epoch = f"--swa {swa:g}: it averages models at the ends of epochs", counted(steps_per_epoch, "step")
    if not last_end:
        raise ConfigError(f"{flag}, and the run has {counted(total_steps, 'step')}, less than one of {epoch}")
    # Rounded down, so that what is offered will do.
    most = 1000 * last_end // total_steps / 1000
    raise ConfigError(f"{flag}, of which the last ends at step {last_end} of {total_steps}; choose at most {most:g}")


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
        return factor(options, step, total_steps)

    return build_period(config.strategy, total_steps, steps_per_epoch, rate)
