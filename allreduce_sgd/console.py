"""What a run says before and after training. Rank 0 only."""

from pathlib import Path
from typing import Any

import torch

from allreduce_sgd.config import Config
from allreduce_sgd.errors import counted
from allreduce_sgd.topology import Topology
from allreduce_sgd.trainer import Trainer

__all__ = ["announce", "conclude", "say"]


def say(topology: Topology, text: str) -> None:
    """Print a line or more on rank 0."""
    if topology.rank == 0:
        print(text, flush=True)


def announce(topology: Topology, config: Config, trainer: Trainer, folder: Path) -> None:
    """Tell what is about to be trained, by whom and how. All ranks may call."""
    dataset, model = trainer.dataset, trainer.strategy.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    algorithm = f" {trainer.comm.algorithm}" if trainer.comm.algorithm else ""
    ranks = f"{counted(topology.size, 'rank')} on {counted(topology.nodes, 'node')}"
    threads = torch.get_num_threads()
    held_out = "" if dataset.validation is None else f", {len(dataset.validation):,} validation"
    say(
        topology,
        f"{ranks}, {trainer.device}, {counted(threads, 'thread')} each, {trainer.comm.backend}{algorithm}, "
        f"strategy {trainer.strategy.name}{', optimizer sharded' if trainer.strategy.sharded else ''}\n"
        f"{dataset.name}: {len(dataset.train):,} training{held_out} and {len(dataset.test):,} test samples; "
        f"{config.model.model}: {parameters:,} parameters; {config.optimizer.optimizer}; "
        f"mini-batch {trainer.global_batch_size}; {trainer.total_steps:,} steps\n"
        f"results in {folder}",
    )
    if config.communication.verbose:
        for index, n_bytes in enumerate(trainer.strategy.message_bytes()):
            how = trainer.comm.describe_algorithm(n_bytes) or trainer.comm.backend
            say(topology, f"bucket {index}: {n_bytes:,} bytes by {how}")


def conclude(topology: Topology, summary: dict[str, Any], folder: Path) -> None:
    """Tell what came of it."""
    accuracy = summary["test_accuracy"]
    result = f"test loss {summary['test_loss']:.4f}" if accuracy is None else f"test accuracy {100 * accuracy:.2f} %"
    lines = [
        f"{result} after {summary['steps']} steps, {summary['train_seconds']:.2f} s of training "
        f"({summary['samples_per_second']:,.0f} samples/s, "
        f"{summary['exposed_communication_seconds']:.2f} s waiting for communication)"
    ]
    if summary["best_step"] is not None:
        stopped = "stopped early; " if summary["stopped_early"] else ""
        loss = summary["validation_loss"]
        lines.append(f"{stopped}the final model is that of step {summary['best_step']}, validation loss {loss:.4f}")
    targets = [summary[name] for name in ("target_accuracy", "target_loss") if summary[name] is not None]
    if targets:
        reached = "reached" if summary["reached_target"] else "not reached"
        lines.append(f"target {', '.join(map(str, targets))} {reached}")
    lines.append(f"summary: {folder / 'summary.json'}")
    say(topology, "\n".join(lines))
