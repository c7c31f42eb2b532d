"""Going on from a checkpoint: which one, with which configuration, and what will differ from an undisturbed run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from allreduce_sgd.config import OF_ONE_RUN, Config, config_from, options
from allreduce_sgd.errors import CommunicationError, ConfigError, quoted
from allreduce_sgd.strategies.options import OUTER

if TYPE_CHECKING:
    from allreduce_sgd.checkpoint import Checkpoint
    from allreduce_sgd.comm.base import Communicator
    from allreduce_sgd.comm.choice import Choice

__all__ = ["differences", "find_checkpoint", "fitting", "resumed_config", "saved_choice"]

_CHANGEABLE = frozenset(
    "resume output epochs steps target-accuracy target-loss evaluate-every log-every checkpoint-every keep-checkpoints "
    "tensorboard trace backend algorithm deterministic verbose timeout-seconds device threads data-dir shard-optimizer "
    "find-unused-parameters static-graph check-finite check-sync check-gradients grace-seconds straggler noise-scale "
    "patience min-delta plateau-patience pause-after-steps pause-after-epochs".split()
)
_BUCKET_SIZES = frozenset({"bucket-mb", "first-bucket-mb"})
# What of a checkpoint no load_state_dict of torch's judges: its type, and the least number.
_SAVED: Mapping[str, tuple[type, int | None]] = MappingProxyType(
    {
        "configuration": (dict, None),
        "backend": (str, None),
        "epoch_totals": (list, None),
        "watch": (dict, None),
        "evaluations": (dict, None),
        "final_model": (dict, None),
        "step": (int, 0),
        "samples": (int, 0),
        "global_batch_size": (int, 1),
        "predicted": (int, 0),
        "threads": (int, 1),
        "world_size": (int, 1),
        "servers": (int, 0),
    }
)
_MOST = 2**53


def find_checkpoint(config: Config) -> "Checkpoint | None":
    """Return the checkpoint that --resume names, None without it."""
    from allreduce_sgd.checkpoint import find

    return None if config.run.resume is None else find(Path(config.run.resume))


def _check(saved: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint does not hold what this program saves: its hashes only tell of accidents."""
    for name, (kind, least) in _SAVED.items():
        value = saved.get(name)
        if type(value) is not kind or (isinstance(value, int) and not (least or 0) <= value <= _MOST):
            raise ConfigError(f"--resume: the checkpoint's {name} is damaged: {quoted(value)}")
    known = {each.name: each for each in options()}
    for name, value in saved["configuration"].items():
        if name not in known:
            raise ConfigError(f"--resume: the checkpoint's configuration has an unknown option {quoted(name)}")
        known[name].check(value, "--resume: the checkpoint's configuration")


@contextmanager
def fitting(checkpoint: "Checkpoint") -> Iterator[None]:
    """Turn what taking up the state of a checkpoint raises, because it does not fit this run, into ConfigError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as problem:
        if isinstance(problem, CommunicationError) or type(problem).__name__ == "OutOfMemoryError":
            raise
        why = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        raise ConfigError(
            f"--resume: checkpoint {checkpoint.folder} does not fit this run or is damaged: {why}"
        ) from problem


def resumed_config(config: Config, explicit: frozenset[str], saved: dict[str, Any], same_size: bool) -> Config:
    """Return the configuration that the checkpoint was trained with, changed by the flags that may change it.

    `saved` is what all ranks share in the checkpoint, `same_size` whether it was written by as many ranks.
    """
    _check(saved)
    before, now = saved["configuration"], config.flat()
    # What codecs keep belongs to their buckets.
    changeable = _CHANGEABLE | (_BUCKET_SIZES if before.get("compression", "none") == "none" else frozenset())
    for name in sorted(explicit - changeable):
        if before.get(name) != now[name]:
            has = "its default" if before.get(name) is None else before[name]
            raise ConfigError(f"--{name} {now[name]}: the run being resumed has {has}; start a new run to change it")
    of_one_run = dict.fromkeys((*OF_ONE_RUN, "trace", "check-gradients"))
    values = {**before, **of_one_run, **{name: now[name] for name in explicit}}
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if given in explicit:
            values[other] = None
    if not same_size and not before.get("full-batch"):
        # So that config.toml, run again on these ranks, is the same training.
        values["batch-size"], values["global-batch-size"] = None, saved["global_batch_size"]
    if not same_size:
        # Of ranks that may not be there, and of more than one.
        values |= {name: None for name in ("straggler", "noise-scale") if name not in explicit}
    return config_from(values)


def saved_choice(saved: dict[str, Any], size: int, explicit: frozenset[str]) -> "Choice | None":
    """Return the resumed run's table of algorithms, None where this run has to find its own."""
    from allreduce_sgd.comm.choice import Choice

    table = saved.get("algorithm_table")
    if table is None or saved["world_size"] != size or explicit & {"algorithm", "deterministic"}:
        return None
    try:
        return Choice.from_lists(table)
    except ValueError as problem:
        raise ConfigError(f"--resume: the checkpoint's algorithm_table is damaged: {problem}") from problem


def differences(saved: dict[str, Any], config: Config, comm: "Communicator") -> str:
    """Say what keeps a resumed run from being bit-identical to an undisturbed one."""
    import torch

    present = {"ranks": comm.size, "threads": torch.get_num_threads(), "backend": comm.backend}
    sizes = () if config.communication.deterministic else sorted(_BUCKET_SIZES)
    present |= {name: config.flat()[name] for name in sizes}
    before = {"ranks": saved["world_size"], "threads": saved["threads"], "backend": saved["backend"]}
    before |= {name: saved["configuration"][name] for name in sizes}
    if config.strategy.virtual_ranks is not None:
        # Nothing else changes a bit.
        present = {"threads": present["threads"]}
    changes = [f"{name} {before[name]} -> {now}" for name, now in present.items() if before[name] != now]
    if config.strategy.virtual_ranks is None and saved.get("algorithm_table") != comm.algorithm_table:
        changes.append("another table of algorithms")
    told = f" (sums will round differently: {', '.join(changes)})" if changes else ""
    if config.compression.compression != "none" and saved["world_size"] != comm.size:
        told += " (what compression had left to send is lost: it belonged to other ranks)"
    if saved["world_size"] != comm.size:
        if config.strategy.served:
            told += " (the servers' optimizers begin afresh)"
        elif config.strategy.strategy in OUTER:
            told += " (the outer optimizer begins afresh)"
    return told
