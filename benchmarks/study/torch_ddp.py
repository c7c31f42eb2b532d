"""The peer contender: torch's DistributedDataParallel over Gloo, in the loop that its users write.

    mpirun -np N python -m benchmarks.study.torch_ddp [flags of allreduce_sgd.train]

What is trained is exactly what `--strategy sync` trains: initial model, order of samples, optimizer, learning rates and
evaluations are made by the same functions from the same flags. So are the clocks and the run's files, but that nobody
counts what Gloo sends: bytes and seconds of communication are null. Flags that the loop has no use for are refused.
DDP has its own defaults, except that gradients lie in its buckets (`gradient_as_bucket_view`), which saves it a copy.

Where the ranks' parts of an epoch's last mini-batch differ in size, a rank's loss is weighted, so that DDP's mean over
ranks is the mean over samples, as it is with us.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allreduce_sgd.checks import check_fit, check_same_configuration, global_batch_size
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.factory import connect
from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.command_line import parse
from allreduce_sgd.config import Config
from allreduce_sgd.data.registry import load_dataset
from allreduce_sgd.data.sampling import build_sampler
from allreduce_sgd.data.split import Dataset
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.feed import Feed, loss_for
from allreduce_sgd.gradients.replicate import common_sha256
from allreduce_sgd.metrics import MetricsLog, Tally, write_json
from allreduce_sgd.models.losses import Loss
from allreduce_sgd.models.registry import build_model
from allreduce_sgd.optim.build import build_optimizer, name_of, needs_closure
from allreduce_sgd.optim.schedule import build_schedule
from allreduce_sgd.run_folder import claim
from allreduce_sgd.stopwatch import Stopwatch
from allreduce_sgd.topology import Topology, discover, launcher_rank
from benchmarks.step_contenders import TORCH, close_gloo
from benchmarks.study.torch_ddp_flags import check_flags

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Train, and return the exit status: 0, or 2 for bad arguments. All ranks must call with the same ones."""
    try:
        config, _ = parse(arguments)
        check_flags(config)
        topology = discover(timeout_seconds=config.communication.timeout_seconds)
    except ConfigError as problem:
        if launcher_rank(os.environ) == 0:
            _complain(problem)
        return 2
    install_excepthooks(topology)
    try:
        _train(topology, config)
    except ConfigError as problem:
        if problem.rank in (None, topology.rank):
            _complain(problem)
        return 2
    return 0


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if needs_closure(optimizer):
        raise ConfigError(
            f"--optimizer {name_of(optimizer)}: the loop with torch's DDP computes one gradient a step; take another"
        )


def _train(topology: Topology, config: Config) -> None:
    check_same_configuration(topology, config)
    torch.set_num_threads(config.training.threads or topology.threads_per_rank())
    device = topology.agree(lambda: topology.choose_device(config.training.device))
    seed = config.training.seed
    dataset = topology.agree(lambda: load_dataset(config.data, seed))
    torch.manual_seed(seed)
    loss = topology.agree(lambda: loss_for(config.model, dataset))
    model = topology.agree(
        lambda: build_model(
            config.model, dataset.input_shape, dataset.classes, seed, dataset.kind, dataset.sparse_features
        )
    ).to(device)
    if topology.rank > 0:
        torch.manual_seed(seed + 1_000_003 * topology.rank)
    topology.agree(lambda: check_fit(model, loss, dataset, device))
    topology.agree(lambda: _check_optimizer(build_optimizer(config.optimizer, model.parameters())))
    limit_seconds = config.communication.timeout_seconds
    comm = connect(topology, device, CommunicationOptions("gloo", timeout_seconds=limit_seconds))
    folder = topology.agree(lambda: claim(config, topology.size, 0) if topology.rank == 0 else Path())
    log = MetricsLog(folder) if topology.rank == 0 else None
    summary = _fit(config, comm, device, dataset, loss, model, log)
    if log is not None:
        write_json(folder / "summary.json", summary)
    close_gloo(comm)


def _fit(
    config: Config,
    comm: Communicator,
    device: torch.device,
    dataset: Dataset,
    loss: Loss,
    model: nn.Module,
    log: MetricsLog | None,
) -> dict[str, Any]:
    """Train to the end, and return the summary. All ranks must call."""
    batch = global_batch_size(config, comm.size, dataset, {})
    sampler = build_sampler(config.data.sampling, len(dataset.train), batch, config.training.seed)
    in_epoch = sampler.steps_per_epoch
    total_steps = config.training.steps or (config.training.epochs or 20) * in_epoch
    evaluate_every = config.training.evaluate_every or in_epoch
    target = config.training.target_accuracy
    feed = Feed(dataset, loss, device, "fp32", 1)
    replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = build_optimizer(config.optimizer, model.parameters())
    schedule = build_schedule(config.optimizer, optimizer, total_steps, batch)
    model.train()
    watch = Stopwatch(comm, device)
    step = samples = 0
    tally, train_loss, reached = Tally(), None, False
    test_loss: float | None = None
    accuracy: float | None = None

    def write(event: str, values: dict[str, Any]) -> None:
        if log is not None:
            times = {"train_seconds": watch.train_seconds, "wall_seconds": watch.wall_seconds}
            log.write(event, step, {"epoch": step / in_epoch, "samples": samples, **values, **times})

    while step < total_steps and not reached:
        with watch.training():
            due = False
            while not due:
                epoch, position = divmod(step, in_epoch)
                count = sampler.global_count(position)
                indices = sampler.indices(epoch, position, comm.rank, comm.size)
                inputs, targets = (part.to(device) for part in dataset.train.batch(indices))
                if dataset.augmentation is not None:
                    inputs = dataset.augmentation(inputs, indices, sampler.visit(epoch, position))
                optimizer.zero_grad()
                mean_loss: Tensor = loss(replica(inputs), targets) if len(indices) else replica(inputs).sum()
                weight = len(indices) * comm.size / count
                (mean_loss if weight == 1.0 else weight * mean_loss).backward()
                if config.optimizer.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
                optimizer.step()
                schedule.step()
                if len(indices):
                    tally.add(mean_loss, len(indices), None, 0)
                step += 1
                samples += count
                due = step % evaluate_every == 0 or step == total_steps
                if due or step % config.run.log_every == 0:
                    totals, _ = tally.reduce(comm)
                    train_loss = totals.mean_loss
                    write("train", {"loss": train_loss, "communication_bytes": None})
        totals, _ = feed.evaluate(model, comm.rank, comm.size).reduce(comm)
        test_loss, accuracy = totals.mean_loss, totals.accuracy
        reached = target is not None and (accuracy or 0.0) >= target
        write("evaluation", {"test_loss": test_loss, "test_accuracy": accuracy})
    return {
        "world_size": comm.size,
        "strategy": TORCH,
        "backend": comm.backend,
        "steps": step,
        "epochs": step / in_epoch,
        "samples": samples,
        "global_batch_size": batch,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "test_accuracy": accuracy,
        "target_accuracy": target,
        "reached_target": reached,
        "train_seconds": watch.train_seconds,
        "wall_seconds": watch.wall_seconds,
        "samples_per_second": samples / max(watch.train_seconds, 1e-9),
        "communication_bytes": None,
        "communication_seconds": None,
        "exposed_communication_seconds": None,
        "seed": config.training.seed,
        "parameters_sha256": common_sha256(model, comm),
    }


def _complain(problem: ConfigError) -> None:
    print(f"torch_ddp: error: {problem}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
