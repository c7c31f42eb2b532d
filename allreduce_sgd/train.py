"""`python -m allreduce_sgd.train`: parse, build, fit.

Every rank runs this. Whatever can fail through bad input runs under `Topology.agree`, so that a mistake seen by one
rank ends all of them alike: one line from one rank, exit status 2.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allreduce_sgd.command_line import parse
from allreduce_sgd.config import Config, RunOptions
from allreduce_sgd.errors import ConfigError, OutputError, counted, write_line
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.preemption import Preemption
from allreduce_sgd.resume import differences, find_checkpoint, fitting, resumed_config, saved_choice
from allreduce_sgd.run_folder import claim
from allreduce_sgd.topology import Topology, discover, launcher_rank

if TYPE_CHECKING:
    from torch import nn

    from allreduce_sgd.comm.base import Communicator
    from allreduce_sgd.metrics import MetricsLog
    from allreduce_sgd.strategies.base import Strategy
    from allreduce_sgd.strategies.server.loop import Server
    from allreduce_sgd.strategies.server.roles import Role
    from allreduce_sgd.trainer import Trainer

__all__ = ["PREEMPTED", "main", "run"]

PREEMPTED = 75
_DOWNLOAD_SECONDS = 30.0
# For the other ranks, while one downloads: hours on a slow line, but not for ever.
_DOWNLOAD_WAIT_SECONDS = 6 * 3600.0


def run() -> int:
    """Run the command line and return the exit status: the entry point of `allreduce-sgd`."""
    status = main(sys.argv[1:])
    if status in (0, PREEMPTED):
        # Said again until the process has ended, a signal would make another status of it.
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return status


def main(arguments: Sequence[str]) -> int:
    """Train as the arguments say, and return the exit status: 0 done, 2 bad arguments, 75 stopped by a
    signal after a checkpoint.

    All ranks must call with the same arguments. Failures of other kinds raise; under a launcher they end all ranks.
    """
    quiet = open(os.devnull, "w") if launcher_rank(os.environ) > 0 else contextlib.nullcontext(sys.stdout)  # noqa: SIM115
    config: Config | None = None
    explicit: frozenset[str] = frozenset()
    mistake: ConfigError | None = None
    try:
        # Every rank parses, but only one prints --help.
        with quiet as out, contextlib.redirect_stdout(out):
            config, explicit = parse(arguments)
    except ConfigError as problem:
        mistake = problem
    try:
        need_mpi = config is not None and config.communication.backend == "mpi"
        timeout_seconds = config.communication.timeout_seconds if config is not None else 60.0
        topology = discover(need_mpi=need_mpi, timeout_seconds=timeout_seconds)
    except ConfigError as problem:
        if launcher_rank(os.environ) == 0:
            _complain(mistake or problem)
        return 2
    install_excepthooks(topology)
    run_options = RunOptions() if config is None else config.run
    try:
        # From the start, so that a warning that comes while data load is not lost (nor ends this rank alone).
        with Preemption(topology, run_options.grace_seconds) as preemption:
            config = topology.agree(lambda: _parsed(config, mistake))
            finished = _train(topology, config, explicit, preemption)
    except ConfigError as problem:
        if problem.rank is None and topology.size > 1:
            raise
        if problem.rank in (None, topology.rank):
            _complain(problem)
        return 2
    except OutputError as problem:
        if topology.size > 1:
            raise
        _complain(problem)
        return 1
    return 0 if finished else PREEMPTED


def _parsed(config: Config | None, mistake: ConfigError | None) -> Config:
    if config is None:
        raise mistake or ConfigError("no configuration")
    return config


def _complain(problem: Exception) -> None:
    write_line(f"allreduce-sgd: error: {problem}", sys.stderr)


def _train(topology: Topology, config: Config, explicit: frozenset[str], preemption: Preemption) -> bool:
    """Train, and say whether it came to its end (else it was asked to stop, and has written a checkpoint)."""
    import torch

    from allreduce_sgd.checks import (
        check_fit,
        check_same_code,
        check_same_configuration,
        check_same_data,
        check_shares,
        check_strategy,
        count_workers,
        global_batch_size,
        period_of,
    )
    from allreduce_sgd.chrome_trace import check_trace_file
    from allreduce_sgd.comm.factory import connect
    from allreduce_sgd.data.registry import load_dataset
    from allreduce_sgd.data.sampling import build_sampler
    from allreduce_sgd.gradients.sync_batch_norm import close_sync_batchnorm
    from allreduce_sgd.metrics import check_tensorboard, write_json
    from allreduce_sgd.models.losses import build_loss
    from allreduce_sgd.models.registry import build_model
    from allreduce_sgd.optim.schedule import build_schedule
    from allreduce_sgd.strategies.build import build_strategy
    from allreduce_sgd.strategies.server.build import build_server
    from allreduce_sgd.strategies.server.roles import divide
    from allreduce_sgd.trainer import Trainer

    check_same_code(topology)
    check_same_configuration(topology, config)
    checkpoint = topology.agree(lambda: find_checkpoint(config))
    saved = {} if checkpoint is None else topology.agree(checkpoint.shared)
    if checkpoint is not None:
        config = topology.agree(lambda: resumed_config(config, explicit, saved, checkpoint.world_size == topology.size))
    size = topology.size
    workers = topology.agree(lambda: count_workers(config, size))
    torch.set_num_threads(config.training.threads or topology.threads_per_rank())
    device = topology.agree(lambda: topology.choose_device(config.training.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _download(topology, config)
    dataset = topology.agree(lambda: load_dataset(config.data, config.training.seed))
    check_same_data(topology, dataset)
    batch = topology.agree(lambda: global_batch_size(config, workers, dataset, saved))
    predicted = int(saved["predicted"]) if saved else config.strategy.predicted(workers, batch)
    sampler = build_sampler(config.data.sampling, len(dataset.train), batch + predicted, config.training.seed)
    total_steps = config.training.steps or (config.training.epochs or 20) * sampler.steps_per_epoch
    topology.agree(lambda: check_shares(config, workers, batch, sampler, total_steps))
    torch.manual_seed(config.training.seed)
    loss = topology.agree(lambda: build_loss(config.model.loss, config.model.model, dataset.classes))
    model = topology.agree(
        lambda: build_model(
            config.model,
            dataset.input_shape,
            dataset.classes,
            config.training.seed,
            dataset.kind,
            dataset.sparse_features,
        )
    ).to(device)
    if topology.rank > 0:
        # Rank 0 goes on with the generator that built the model, as a serial program does; the others draw their own.
        torch.manual_seed(config.training.seed + 1_000_003 * topology.rank)
    topology.agree(lambda: check_fit(model, loss, dataset, device))
    topology.agree(lambda: check_strategy(config, topology.size, model))
    period = topology.agree(lambda: period_of(config, total_steps, sampler.steps_per_epoch))
    topology.agree(lambda: check_tensorboard(config.run.tensorboard))
    if config.run.trace is not None:
        trace = Path(config.run.trace)
        topology.agree(lambda: check_trace_file(trace) if topology.rank == 0 else None)
    table = topology.agree(lambda: saved_choice(saved, topology.size, explicit))
    communication = config.communication
    if communication.backend == "auto" and config.strategy.needs_messages and size > 1:
        communication = dataclasses.replace(communication, backend="mpi")
    comm = topology.agree(lambda: connect(topology, device, communication, table))
    preemption.share(comm)
    role: Role | None = None
    try:
        if config.strategy.served:
            role = topology.agree(lambda: divide(comm, config.strategy))
        peers = comm if role is None else role.peers
        topology.agree(lambda: _convert(config, model, peers))
        how = config.strategy, config.gradients, config.optimizer, model
        codec, seed = config.compression, config.training.seed
        server: Server | None = None
        strategy: Strategy | None = None
        if role is not None and role.serves:
            server = topology.agree(lambda: build_server(*how, role, compression=codec, seed=seed))
        else:
            precision = config.training.precision
            strategy = topology.agree(
                lambda: build_strategy(
                    *how, peers, period=period, role=role, compression=codec, precision=precision, seed=seed
                )
            )
        claimed = topology.agree(
            lambda: claim(config, topology.size, saved.get("step", 0)) if topology.rank == 0 else None
        )
        folder = Path(topology.broadcast(str(claimed)))
        log = topology.agree(lambda: _open_log(topology, config, folder))
        own = None
        if checkpoint is not None and (checkpoint.world_size, saved["servers"]) == (size, size - workers):
            own = topology.agree(lambda: checkpoint.of_rank(topology.rank))
        elif checkpoint is not None and config.strategy.virtual_ranks is not None:
            # Ranks have nothing of their own.
            own = topology.agree(lambda: checkpoint.of_rank(0))
        if server is not None:
            _serve(server, own, folder, config, comm)
            preemption.settle()
            return topology.broadcast(False)
        assert strategy is not None
        with log or contextlib.nullcontext():
            schedule = build_schedule(config.optimizer, strategy.optimizer, total_steps)
            trainer = Trainer(
                config,
                peers,
                device,
                dataset,
                loss,
                strategy,
                schedule,
                sampler,
                total_steps,
                predicted,
                folder,
                log,
                preemption.asked,
            )
            if checkpoint is not None:
                with fitting(checkpoint):
                    trainer.load_state_dict(saved, own)
                told = differences(saved, config, comm)
                _say(topology, f"resumed from {checkpoint.folder} at step {trainer.step}{told}")
            _announce(topology, config, trainer, torch.get_num_threads(), folder)
            summary = trainer.fit()
            preemption.settle()
            if summary is None:
                _say(topology, f"stopped at step {trainer.step}; go on with --resume {folder}")
            elif topology.rank == 0:
                write_json(folder / "summary.json", summary)
                _conclude(summary, folder)
        return topology.broadcast(summary is not None)
    finally:
        if sys.exc_info()[0] is None:
            close_sync_batchnorm(model)
            if role is not None:
                role.peers.close()
            comm.close()


def _serve(server: "Server", own: dict[str, Any] | None, folder: Path, config: Config, comm: "Communicator") -> None:
    """Serve parameters until all workers are done; `own` is what this rank saved in a checkpoint."""
    from allreduce_sgd.checkpoint import save

    if own is not None:
        server.load_state_dict(own["server"])
    keep = config.run.keep_checkpoints
    server.serve(lambda step: save(folder, step, {}, {"server": server.state_dict()}, keep, comm))


def _download(topology: Topology, config: Config) -> None:
    """Have one rank of each node fetch the data set's missing files, while the others wait."""
    from allreduce_sgd.data.fetch import fetch, missing_files
    from allreduce_sgd.data.files import data_folder

    missing = topology.agree(lambda: missing_files(config.data))
    if any(topology.gather_all(bool(missing))):
        leader = topology.local_rank == 0

        def fetch_missing() -> None:
            if leader and missing:
                show = topology.rank == 0 and sys.stderr.isatty()
                fetch(missing, data_folder(config.data), show, _DOWNLOAD_SECONDS)

        topology.agree(fetch_missing, _DOWNLOAD_WAIT_SECONDS)


def _convert(config: Config, model: "nn.Module", comm: "Communicator") -> None:
    from allreduce_sgd.gradients.sync_batch_norm import convert_sync_batchnorm

    if not config.gradients.sync_batch_norm:
        return
    try:
        convert_sync_batchnorm(model, comm)
    except ValueError as problem:
        raise ConfigError(f"--sync-batch-norm: {' '.join(str(problem).split())}") from problem


def _open_log(topology: Topology, config: Config, folder: Path) -> "MetricsLog | None":
    from allreduce_sgd.metrics import MetricsLog

    return MetricsLog(folder, config.run.tensorboard) if topology.rank == 0 else None


def _say(topology: Topology, text: str) -> None:
    if topology.rank == 0:
        print(text, flush=True)


def _announce(topology: Topology, config: Config, trainer: "Trainer", threads: int, folder: Path) -> None:
    dataset, model = trainer.dataset, trainer.strategy.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    algorithm = f" {trainer.comm.algorithm}" if trainer.comm.algorithm else ""
    ranks = f"{counted(topology.size, 'rank')} on {counted(topology.nodes, 'node')}"
    _say(
        topology,
        f"{ranks}, {trainer.device}, {counted(threads, 'thread')} each, {trainer.comm.backend}{algorithm}, "
        f"strategy {trainer.strategy.name}{', optimizer sharded' if trainer.strategy.sharded else ''}\n"
        f"{dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test samples; "
        f"{config.model.model}: {parameters:,} parameters; {config.optimizer.optimizer}; "
        f"mini-batch {trainer.global_batch_size}; {trainer.total_steps:,} steps\n"
        f"results in {folder}",
    )
    if config.communication.verbose:
        for index, n_bytes in enumerate(trainer.strategy.message_bytes()):
            how = trainer.comm.describe_algorithm(n_bytes) or trainer.comm.backend
            _say(topology, f"bucket {index}: {n_bytes:,} bytes by {how}")


def _conclude(summary: dict[str, Any], folder: Path) -> None:
    accuracy = summary["test_accuracy"]
    result = f"test loss {summary['test_loss']:.4f}" if accuracy is None else f"test accuracy {100 * accuracy:.2f} %"
    print(
        f"{result} after {summary['steps']} steps, {summary['train_seconds']:.2f} s of training "
        f"({summary['samples_per_second']:,.0f} samples/s, "
        f"{summary['exposed_communication_seconds']:.2f} s waiting for communication)",
        flush=True,
    )
    targets = [summary[name] for name in ("target_accuracy", "target_loss") if summary[name] is not None]
    if targets:
        reached = "reached" if summary["reached_target"] else "not reached"
        print(f"target {', '.join(map(str, targets))} {reached}", flush=True)
    print(f"summary: {folder / 'summary.json'}", flush=True)


if __name__ == "__main__":
    sys.exit(run())
