"""`python -m allreduce_sgd.train`: parse, build, fit.

Every rank runs this. Whatever can fail through bad input runs under `Topology.agree`, so that a mistake seen by one
rank ends all of them alike: one line from one rank, exit status 2.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allreduce_sgd.command_line import parse
from allreduce_sgd.config import Config, RunOptions
from allreduce_sgd.errors import ConfigError, OutputError, write_line
from allreduce_sgd.failure import install_excepthooks
from allreduce_sgd.preemption import Preemption
from allreduce_sgd.resume import differences, find_checkpoint, fitting, resumed_config, saved_choice
from allreduce_sgd.run_folder import claim
from allreduce_sgd.topology import Topology, discover, launcher_rank

if TYPE_CHECKING:
    from torch import nn

    from allreduce_sgd.comm.base import Communicator
    from allreduce_sgd.metrics import MetricsLog
    from allreduce_sgd.preparation import Work
    from allreduce_sgd.strategies.base import Strategy
    from allreduce_sgd.strategies.server.loop import Server
    from allreduce_sgd.strategies.server.roles import Role

__all__ = ["PREEMPTED", "main", "run"]

PREEMPTED = 75


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
    from allreduce_sgd.checks import check_same_code, check_same_configuration, count_workers
    from allreduce_sgd.chrome_trace import check_trace_file
    from allreduce_sgd.comm.factory import connect
    from allreduce_sgd.console import announce, conclude, say
    from allreduce_sgd.gradients.sync_batch_norm import close_sync_batchnorm
    from allreduce_sgd.metrics import check_tensorboard, write_json
    from allreduce_sgd.optim.schedule import build_schedule
    from allreduce_sgd.preparation import prepare
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
    work = prepare(topology, config, saved, workers)
    model, device = work.model, work.device
    if work.gradient_check is not None:
        say(topology, work.gradient_check)
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
                    *how, peers, period=work.period, role=role, compression=codec, precision=precision, seed=seed
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
            if config.probes.find_lr:
                _find_learning_rate(topology, config, work, strategy, folder, preemption.asked)
                preemption.settle()
                return topology.broadcast(not preemption.asked())
            schedule = build_schedule(config.optimizer, strategy.optimizer, work.total_steps, work.batch)
            trainer = Trainer(
                config,
                peers,
                device,
                work.dataset,
                work.loss,
                strategy,
                schedule,
                work.sampler,
                work.total_steps,
                work.predicted,
                folder,
                log,
                preemption.asked,
            )
            if checkpoint is not None:
                with fitting(checkpoint):
                    trainer.load_state_dict(saved, own)
                told = differences(saved, config, comm)
                say(topology, f"resumed from {checkpoint.folder} at step {trainer.step}{told}")
            announce(topology, config, trainer, folder)
            summary = trainer.fit()
            preemption.settle()
            if summary is None:
                say(topology, f"stopped at step {trainer.step}; go on with --resume {folder}")
            elif topology.rank == 0:
                write_json(folder / "summary.json", summary)
                conclude(topology, summary, folder)
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


def _find_learning_rate(
    topology: Topology, config: Config, work: "Work", strategy: "Strategy", folder: Path, stop_asked: Callable[[], bool]
) -> None:
    """Try learning rates in place of training, and write what they did. All ranks that train call."""
    from allreduce_sgd.console import say
    from allreduce_sgd.probes.lr_finder import STEPS, find_learning_rate
    from allreduce_sgd.probes.lr_finder_report import report_sweep
    from allreduce_sgd.stepper import build_stepper

    stepper = build_stepper(config, strategy, work.device, work.dataset, work.loss, work.sampler, work.predicted)
    sweep = find_learning_rate(stepper, config.training.steps or STEPS, stop_asked)
    if topology.rank == 0:
        say(topology, report_sweep(sweep, folder))


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


if __name__ == "__main__":
    sys.exit(run())
