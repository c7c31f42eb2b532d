"""predict: step time, efficiency and speed-up to accuracy for up to thousands of ranks, from a profile."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_writable, names, positive_int, positive_ints, positive_number
from benchmarks.record import write_record
from benchmarks.scaling.codecs import CODEC_NAMES, codec_of
from benchmarks.scaling.folder import check_folder, draw_figures
from benchmarks.scaling.network_flags import (
    accuracy_of,
    add_network_flags,
    add_target_flags,
    check_model,
    connect_ranks,
    stragglers_of,
)
from benchmarks.scaling.prediction_rows import Predictor, Scaling
from benchmarks.scaling.profile import Compute, Profile, read_profile
from benchmarks.scaling.stepping import Plan
from benchmarks.scaling.tables import prediction_tables

__all__ = ["main", "plan_of", "workloads_of"]

_STRATEGIES = ("sync", "local", "delayed")
_SCALINGS: tuple[Scaling, ...] = ("weak", "strong")


def main(arguments: Sequence[str]) -> int:
    """Predict, print and write. Raises ConfigError for bad arguments."""
    options = _parse(arguments)
    profile = read_profile("--profile", options.profile)
    connection, stragglers = connect_ranks(options, profile), stragglers_of(options, profile)
    accuracy = accuracy_of(options)
    plans = [plan_of(name, options, profile) for name in options.strategies]
    rows: list[dict[str, Any]] = []
    workloads = workloads_of("--workloads", options.workloads, profile)
    if accuracy is not None and len({each.model for each in workloads}) > 1:
        raise ConfigError("--workloads: a target is that of one model; choose one")
    if accuracy is not None:
        check_model("--workloads", accuracy, workloads[0])
    cases = [(each, plan, scaling) for each in workloads for plan in plans for scaling in options.scaling]
    for each, plan, scaling in tqdm(cases, desc="predicting", leave=False, disable=not sys.stderr.isatty()):
        predictor = Predictor(profile, each.model, connection.reductions, connection.text, stragglers, accuracy)
        batch = options.batch or each.batch_size
        rows += predictor.table(options.ranks, plan, scaling, options.global_batch or batch)
    if not rows:
        raise ConfigError("--ranks: in strong scaling no rank would have a sample; give a larger --global-batch")
    print(prediction_tables(rows, profile))
    if options.json is not None:
        write_record(options.json, "scaling", ["predict", *arguments], rows)
    draw_figures(rows, options.figures)
    return 0


def plan_of(strategy: str, options: argparse.Namespace, profile: Profile) -> Plan:
    """Return what the flags tell the trainer to do with this strategy. Raises ConfigError where it makes no sense."""
    codec = codec_of(options.compression, profile, options.codec_ns_per_byte)
    sizes = {"bucket_mb": options.bucket_mb, "first_bucket_mb": min(1.0, options.bucket_mb), "codec": codec}
    if strategy == "local":
        delay = 0 if options.delay is None or "delayed" in options.strategies else options.delay
        if delay >= options.period:
            raise ConfigError(f"--delay {delay}: in local SGD less than --period {options.period}")
        return Plan("local", options.period, delay, **sizes)
    if strategy == "delayed":
        return Plan("delayed", 1, options.delay or 1, **sizes)
    return Plan("sync", **sizes)


def workloads_of(flag: str, text: str | None, profile: Profile) -> list[Compute]:
    """Return one measurement of each workload that is asked for, by default of each model."""
    if text is None:
        return list({each.model: each for each in profile.computes}.values())
    known = {each.workload: each for each in profile.computes}
    return [known[name] for name in names(flag, text, tuple(known))]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("scaling predict", "Predict what more ranks would give; every number is simulated.")
    add_network_flags(parser)
    add = parser.add_argument
    add("--ranks", type=positive_ints, default="1,2,4,16,64,256,1024,4096,16384", metavar="NUMBERS", help="predicted")
    add("--workloads", metavar="NAMES", help="of the profile; not set: one of each model")
    add("--scaling", default="weak", metavar="WHICH", help="weak (fixed batch of a rank), strong (of all), or both")
    add("--batch", type=positive_int, metavar="N", help="samples of a rank and step; not set: the workload's")
    add("--global-batch", type=positive_int, metavar="N", help="samples of all ranks, for strong scaling")
    add("--strategies", default="sync", metavar="NAMES", help=f"of {', '.join(_STRATEGIES)}")
    add("--period", type=positive_int, default=8, metavar="N", help="steps between two averages of local SGD")
    add("--delay", type=positive_int, metavar="N", help="steps for which sums travel; delayed: 1 where not set")
    add("--bucket-mb", type=positive_number, default=25.0, metavar="MIB", help="size of a gradient bucket")
    add("--compression", choices=CODEC_NAMES, default="none", help="codec of the gradients")
    add("--codec-ns-per-byte", type=positive_number, metavar="NS", help="its time; not set: as measured, or none")
    add_target_flags(parser)
    add("--json", type=Path, metavar="FILE", help="write the record here")
    add("--figures", type=Path, metavar="DIR", help="draw PNGs into this folder")
    options = parser.parse_args(arguments)
    options.scaling = names("--scaling", options.scaling, _SCALINGS)
    options.strategies = names("--strategies", options.strategies, _STRATEGIES)
    if options.global_batch is not None and "strong" not in options.scaling:
        raise ConfigError("--global-batch: weak scaling has none; choose --scaling strong")
    if options.global_batch is not None and "weak" in options.scaling:
        raise ConfigError("--global-batch: give --batch where both scalings are predicted")
    check_writable("--json", options.json)
    check_folder("--figures", options.figures)
    return options
