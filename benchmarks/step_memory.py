"""What memory does a step need, over the plain module's? `python -m benchmarks.step_memory` (without mpirun).

Every contender is measured on ranks of its own, in fresh processes, so that none finds what another left:

- no_communication  the bare module, on all ranks at once, each knowing nothing of the others
- allreduce_sgd     ours, in each of `--settings`
- torch_ddp_gloo    torch's DistributedDataParallel over Gloo, gradients as views of its buckets

All from the kernel, so that no library can hide anything: the peak is that of resident memory over the timed steps
(VmHWM, set back before them), without the pages of program files; pages that ranks share count for each with its part
(Pss). malloc is told to map every
block of 64 KiB or more on its own, and to give it back at once: resident is then what is in use, and every page fault
of the steady state is a page of memory that was fetched anew, by whatever thread or library. `before` is what there
is before the module is made, so that the constant memory of MPI, Gloo and our staging can be told from that which
grows with the model.

Allocations are those of tensors in the training thread, of whatever size and also from memory that was just given
back, counted by torch's profiler; the progress thread is not seen by it, but its page faults are. Of torch's DDP they
are not counted, since the profiler crashes beside Gloo's threads now and then.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_writable, names, positive_int
from benchmarks.record import write_record
from benchmarks.runs import find_mpirun
from benchmarks.step_contenders import BASELINE, OURS, SETTINGS, TORCH
from benchmarks.table import format_number, format_table
from benchmarks.workloads import WORKLOADS

__all__ = ["main", "rows_of"]

_ALLOCATED = ("allocations_per_step", "allocated_bytes_per_step")
_MAPPED_BYTES = 64 * 1024
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str]) -> int:
    """Measure, and return the exit status: 0; 1 where a measurement failed; 2 for bad arguments."""
    try:
        options = _parse(arguments)
        rows = []
        for workload in options.workloads:
            found = {}
            for contender, setting in _field(options):
                found[contender, setting] = _measure(workload, contender, setting, options)
            rows += rows_of(workload, options.ranks, found)
    except ConfigError as problem:
        print(f"step_memory: error: {problem}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as problem:
        print(f"step_memory: {problem}", file=sys.stderr, flush=True)
        return 1
    print(_table(rows))
    if options.json is not None:
        write_record(options.json, "step_memory", arguments, rows)
    return 0


def rows_of(workload: str, ranks: int, found: dict[tuple[str, str], dict[str, float]]) -> list[dict[str, Any]]:
    """Return a row for each contender: means over ranks, and what they are over the plain module's."""
    plain = found[BASELINE, ""]
    rows = []
    for (contender, setting), figures in found.items():
        constant = figures["before_bytes"] - plain["before_bytes"]
        extra = figures["peak_bytes"] - plain["peak_bytes"]
        bucket = figures.get("largest_bucket_bytes")
        allowed = None if bucket is None else figures["gradient_bytes"] + bucket
        rows.append(
            {
                "workload": workload,
                "contender": contender,
                "setting": setting,
                "ranks": ranks,
                "peak_bytes": figures["peak_bytes"],
                "gradient_bytes": figures["gradient_bytes"],
                "largest_bucket_bytes": bucket,
                "allowed_bytes": allowed,
                "extra_bytes": extra,
                "constant_bytes": constant,
                "extra_with_model_bytes": extra - constant,
                "ratio_to_allowed": None if allowed is None else (extra - constant) / allowed,
                **{key: figures[key] - plain[key] if key in figures else None for key in _ALLOCATED},
                "fresh_bytes_per_step": _PAGE_BYTES * (figures["page_faults_per_step"] - plain["page_faults_per_step"]),
            }
        )
    return rows


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("step_memory", "Measure what memory a training step needs over the plain module's.")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), metavar="NAMES", help="separated by commas")
    parser.add_argument("--settings", default=",".join(SETTINGS), metavar="NAMES", help="of ours")
    parser.add_argument("--ranks", type=positive_int, default=2, metavar="N", help="of every contender")
    parser.add_argument("--steps", type=positive_int, default=20, metavar="N", help="measured steps")
    parser.add_argument("--timeout-seconds", type=positive_int, default=300, metavar="N", help="of one measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    options.workloads = names("--workloads", options.workloads, tuple(WORKLOADS))
    options.settings = names("--settings", options.settings, SETTINGS)
    check_writable("--json", options.json)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise ConfigError("the kernel's memory figures are needed (/proc/self/clear_refs of Linux), and are not here")
    return options


def _field(options: argparse.Namespace) -> list[tuple[str, str]]:
    return [(BASELINE, ""), *((OURS, setting) for setting in options.settings), (TORCH, "")]


def _measure(workload: str, contender: str, setting: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one contender on ranks of its own. Raises RuntimeError where that fails."""
    program = [sys.executable, "-m", "benchmarks.step_memory_rank"]
    command = [*find_mpirun(), "-n", str(options.ranks), *program, workload, contender, setting, str(options.steps)]
    limits = {name: str(_MAPPED_BYTES) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **limits, "MALLOC_TOP_PAD_": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=options.timeout_seconds,
        )
    except subprocess.TimeoutExpired as problem:
        raise RuntimeError(f"{workload}, {contender}: not finished after {options.timeout_seconds} s") from problem
    if done.returncode:
        raise RuntimeError(f"{workload}, {contender} {setting}: status {done.returncode}\n{done.stderr.strip()}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    figures: dict[str, float] = json.loads(lines[-1])
    return figures


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "workload",
        "contender",
        "peak",
        "over plain",
        "constant",
        "with model",
        "gradients",
        "bucket",
        "÷ allowed",
        "fresh a step",
        "allocated",
        "times",
    ]
    columns = (
        "peak_bytes",
        "extra_bytes",
        "constant_bytes",
        "extra_with_model_bytes",
        "gradient_bytes",
        "largest_bucket_bytes",
    )
    lines = []
    for row in rows:
        ratio, allocated = row["ratio_to_allowed"], row["allocated_bytes_per_step"]
        lines.append(
            [
                row["workload"],
                f"{row['contender']} {row['setting']}".rstrip(),
                *(format_number(None if row[key] is None else row[key] / 1e6) for key in columns),
                format_number(ratio),
                format_number(row["fresh_bytes_per_step"] / 1e6),
                format_number(None if allocated is None else allocated / 1e6),
                format_number(row["allocations_per_step"]),
            ]
        )
    return f"{rows[0]['ranks']} ranks; MB per rank\n\n{format_table(header, lines, 2)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
