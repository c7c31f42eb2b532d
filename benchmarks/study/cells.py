"""The cells of a study, and what the trainer is told for each of them."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

from allreduce_sgd.command_line import parse
from allreduce_sgd.config import options
from allreduce_sgd.errors import ConfigError
from benchmarks.runs import words
from benchmarks.study.results import Cell
from benchmarks.study.spec import Spec
from benchmarks.study.torch_ddp_flags import check_flags

__all__ = ["ALL_CORES", "OURS", "SERIAL", "TORCH", "all_cells", "check_cells", "flags_of", "folder_name", "rates_of"]

SERIAL = "serial"
ALL_CORES = "one_rank_all_cores"
OURS = "allreduce_sgd"
TORCH = "torch_ddp_gloo"

_MOMENTUM = 0.9
# Measurements of the gradient noise scale between two evaluations, at most one per step.
_NOISE_SCALES = 16
# The methods in which ranks update by themselves, and how many ranks serve where the flags do not say.
_SERVERS_OF_LONE = {"hogwild": 0, "server-async": 1, "server-staleness": 1}
# The others say how ours exchanges gradients.
_OF_ALL_CONTENDERS = frozenset(
    each.name for each in options() if each.group in ("data", "model", "training", "optimizer")
)


def all_cells(spec: Spec, cores: int) -> list[Cell]:
    """Return the cells of a machine with so many cores: baselines first, then the grid."""
    grid, baselines = spec.grid, spec.baselines
    found = [Cell(f"serial, batch {batch}", SERIAL, "sync", 1, 1, batch) for batch in baselines.serial_batches]
    if baselines.all_cores and cores > 1:
        found += [
            Cell(f"one rank, {cores} threads, batch {batch}", ALL_CORES, "sync", 1, cores, batch)
            for batch in grid.global_batch_sizes
        ]
    for network, ranks, batch in itertools.product(grid.networks, grid.ranks, grid.global_batch_sizes):
        where = f", {ranks} ranks, batch {batch}"
        over = "" if network == "none" else f", {network}"
        if baselines.torch_ddp:
            found.append(Cell(f"torch DDP{where}{over}", TORCH, "sync", ranks, 1, batch, network=network))
        for entry, algorithm, codec in itertools.product(grid.strategies, grid.algorithms, grid.compressions):
            how = "".join(f", {name}" for name in (algorithm, codec) if name not in ("auto", "none"))
            label, flags = f"{entry.label}{where}{how}{over}", tuple(entry.flags.items())
            found.append(Cell(label, OURS, entry.name, ranks, 1, batch, algorithm, codec, network, flags))
    return found


def check_cells(source: str, spec: Spec, cells: Sequence[Cell]) -> None:
    """Raise ConfigError where two cells are one, or what trains refuses one of them, as far as it tells by its flags.

    `source` is the spec's name or file, for the text.
    """
    if not cells:
        raise ConfigError(f"{source}: no cells: [grid] needs ranks, strategies and global_batch_sizes")
    labels: dict[str, Cell] = {}
    values: dict[Cell, str] = {}
    for cell in cells:
        if cell.label in labels:
            raise ConfigError(f"{source}: two cells are called {cell.label!r}; strategies need labels that differ")
        same = values.setdefault(replace(cell, label=""), cell.label)
        if same != cell.label:
            raise ConfigError(f"{source}: the cells {same!r} and {cell.label!r} are the same")
        labels[cell.label] = cell
        try:
            config, _ = parse(words(flags_of(spec, cell, rates_of(spec, cell)[0], 0)))
            if cell.contender == TORCH:
                check_flags(config)
        except ConfigError as problem:
            raise ConfigError(f"{source}: {cell.label}: {problem}") from problem


def rates_of(spec: Spec, cell: Cell) -> tuple[float, ...]:
    """Return the rates that a cell chooses from, scaled by the samples that one update of its parameters is made from.

    That is the mini-batch, except where every rank's gradient is an update by itself, or with --softsync so many are.
    A serial mini-batch may have rates of its own.
    """
    if cell.contender == SERIAL and cell.global_batch_size in spec.baselines.serial_lr:
        return spec.baselines.serial_lr[cell.global_batch_size]
    if cell.strategy not in _SERVERS_OF_LONE:
        return spec.tuning.rates(cell.global_batch_size)
    flags = dict(cell.flags)
    # The trainer refuses a job without any.
    workers = max(1, cell.ranks - int(flags.get("servers", _SERVERS_OF_LONE[cell.strategy])))
    gradients = max(1, workers // int(flags.get("softsync", workers)))
    return spec.tuning.rates(max(1, cell.global_batch_size * gradients // workers))


def flags_of(spec: Spec, cell: Cell, lr: float, seed: int) -> dict[str, str | int | float | bool]:
    """Return the flags of a run. Whatever results depend on is given explicitly; only folders are left out."""
    every = spec.evaluate_every_samples // cell.global_batch_size
    flags: dict[str, str | int | float | bool] = {
        "dataset": spec.dataset,
        "model": spec.model,
        "optimizer": "sgd",
        "device": "cpu",
        **spec.trainer,
        **dict(cell.flags),
        "strategy": cell.strategy,
        "lr": lr,
        "global-batch-size": cell.global_batch_size,
        "epochs": spec.epochs,
        "target-accuracy": spec.target_accuracy,
        "evaluate-every": every,
        # Logging costs a small all-reduce: as often, in samples, for every cell.
        "log-every": every,
        "seed": seed,
        "threads": cell.threads,
    }
    if spec.hidden is not None:
        flags["hidden"] = spec.hidden
    if str(flags["optimizer"]).lower() == "sgd":
        # DGC has a momentum of its own.
        flags.setdefault("momentum", 0.0 if cell.compression == "dgc" else _MOMENTUM)
    if cell.contender == TORCH:
        return {name: value for name, value in flags.items() if name in _OF_ALL_CONTENDERS}
    if cell.contender == OURS:
        flags |= {"algorithm": cell.algorithm, "compression": cell.compression}
        if spec.noise_scale and cell.strategy == "sync" and cell.compression == "none":
            # It costs an all-reduce of its own, which in every step of a small mini-batch would be most of the time.
            flags["noise-scale"] = max(1, every // _NOISE_SCALES)
    return flags


def folder_name(cell: Cell, lr: float, seed: int) -> str:
    """Return the name of a run's folder, which follows from what was run, and not from what it is called."""
    parts = [cell.contender, cell.strategy, f"p{cell.ranks}", f"t{cell.threads}", f"b{cell.global_batch_size}"]
    parts += [name for name in (cell.algorithm, cell.compression, cell.network) if name not in ("auto", "none")]
    if cell.flags:
        parts.append(hashlib.sha256(json.dumps(cell.flags).encode()).hexdigest()[:8])
    return "-".join([*parts, f"lr{lr:g}", f"seed{seed}"])
