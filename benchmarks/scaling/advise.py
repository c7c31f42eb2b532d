"""advise: which ranks, batch, strategy and bucket size reach a target soonest, and what every other choice would cost.

Every combination is predicted. Recommended is the least time to the target among synchronous SGD of those that use
their ranks well enough: efficiency, speed-up to accuracy ÷ ranks, of at least `--min-efficiency`. Local and delayed SGD
are shown beside it; they are recommended only where a study has runs that tell how many steps they take. A choice whose
runs missed the target takes for ever, and is shown so.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from allreduce_sgd.errors import ConfigError
from benchmarks.arguments import Parser, check_writable, fraction, positive_int, positive_ints, positive_numbers
from benchmarks.record import write_record
from benchmarks.scaling.network_flags import (
    accuracy_of,
    add_network_flags,
    add_target_flags,
    check_model,
    connect_ranks,
    stragglers_of,
)
from benchmarks.scaling.predict import workloads_of
from benchmarks.scaling.prediction_rows import Predictor
from benchmarks.scaling.profile import read_profile
from benchmarks.scaling.stepping import Plan
from benchmarks.scaling.tables import advice_table

__all__ = ["main"]

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Advise, print and write. Raises ConfigError for bad arguments."""
    options = _parse(arguments)
    profile = read_profile("--profile", options.profile)
    accuracy = accuracy_of(options)
    if accuracy is None:
        raise ConfigError("--study: advice needs a target: a study's results, or --s-min and --b-crit")
    if options.workload is not None and "," in options.workload:
        raise ConfigError(f"--workload {options.workload}: advice is for one; choose one")
    work = workloads_of("--workload", options.workload, profile)[0]
    check_model("--workload", accuracy, work)
    connection = connect_ranks(options, profile)
    predictor = Predictor(
        profile, work.model, connection.reductions, connection.text, stragglers_of(options, profile), accuracy
    )
    found = _search(predictor, options)
    if not found:
        raise ConfigError("--global-batches: no batch has a sample for each of --ranks")
    rows = _recommend(found, options.min_efficiency)
    print(advice_table(rows))
    if options.json is not None:
        write_record(options.json, "scaling", ["advise", *arguments], rows)
    return 0


def _search(predictor: Predictor, options: argparse.Namespace) -> list[Row]:
    plans = [Plan(bucket_mb=size, first_bucket_mb=min(1.0, size)) for size in options.bucket_mb]
    largest = max(options.bucket_mb)
    plans += [Plan("local", options.period, bucket_mb=largest), Plan("delayed", 1, 1, bucket_mb=largest)]
    cases = list(itertools.product(plans, options.ranks, options.global_batches))
    rows = []
    for plan, ranks, batch in tqdm(cases, desc="predicting", leave=False, disable=not sys.stderr.isatty()):
        if batch < ranks or (ranks == 1 and plan != plans[0]):
            continue
        row = predictor.row(ranks, batch / ranks, plan, batch)
        row["kind"] = "advice"
        row["accuracy_efficiency"] = row.get("speed_up_to_accuracy", 0.0) / ranks
        rows.append(row)
    return rows


def _recommend(rows: Sequence[Row], min_efficiency: float) -> list[Row]:
    """Return the recommendation first, then the best of each alternative, each row with the name of its choice."""
    known = [row for row in rows if row["steps_basis"] != "assumed" and row["seconds_to_target"] is not None]
    efficient = [row for row in known if row["accuracy_efficiency"] >= min_efficiency]
    best = _soonest(efficient or known)
    chosen = [{**best, "choice": "recommended"}]

    def add(choice: str, found: Sequence[Row]) -> None:
        if found and _soonest(found) is not best:
            chosen.append({**_soonest(found), "choice": choice})

    sync = [row for row in rows if row["strategy"] == "sync"]
    same = [row for row in rows if row["ranks"] == best["ranks"]]
    twins = [row for row in same if all(row[key] == best[key] for key in ("global_batch", "strategy"))]
    add("soonest, at any cost", sync)
    add("fewest rank-hours", [min(known, key=lambda row: (row["rank_hours"], row["seconds_to_target"]))])
    for ranks in sorted({row["ranks"] for row in rows}):
        add(f"{ranks:,} rank{'s' if ranks > 1 else ''}", [row for row in sync if row["ranks"] == ranks])
    for factor, name in ((0.5, "half the batch"), (2, "twice the batch")):
        wanted = factor * best["global_batch"]
        add(name, [row for row in same if row["strategy"] == "sync" and row["global_batch"] == wanted])
    for strategy in ("local", "delayed"):
        mine = [row for row in same if row["strategy"] == strategy]
        # What runs told, be it that they missed the target, counts before what is assumed of other batches.
        add(strategy, [row for row in mine if row["steps_basis"] != "assumed"] or mine)
    for size in sorted({row["bucket_mb"] for row in twins}):
        add(f"buckets of {size:g} MiB", [row for row in twins if row["bucket_mb"] == size])
    chosen[0]["reasons"] = _reasons(best, min_efficiency, bool(efficient))
    return chosen


def _soonest(rows: Sequence[Row]) -> Row:
    def cost(row: Row) -> tuple[float, float, float]:
        return row.get("seconds_to_target") or math.inf, row.get("rank_hours", math.inf), -row["bucket_mb"]

    return min(rows, key=cost)


def _reasons(best: Row, min_efficiency: float, met: bool) -> list[str]:
    share = best["exposed_seconds"] / best["step_seconds"]
    slowest = best["straggler_seconds"] / best["step_seconds"]
    reasons = [
        f"speed-up to accuracy {best['speed_up_to_accuracy']:.3g} over one rank at its best batch "
        f"({best['baseline_batch']}): hardware {best['hardware_efficiency']:.3g} × statistical "
        f"{best['statistical_efficiency']:.3g}",
        f"communication that nothing hides is {share:.0%} of a step, waiting for the slowest rank {slowest:.0%}",
    ]
    if met:
        reasons.append(f"more ranks or other batches are slower, or use ranks to less than {min_efficiency:.0%}")
    else:
        reasons.append(f"nothing uses its ranks to {min_efficiency:.0%}: this is the soonest of all")
    if best["ranks"] > 1:
        computing = 1 - share - slowest
        kept = {
            "that larger batches need more samples": best["statistical_efficiency"],
            "the network and the slowest rank": computing,
            "that a rank computes slower on fewer samples": best["hardware_efficiency"] / best["ranks"] / computing,
        }
        worst = min(kept, key=kept.__getitem__)
        reasons.append(f"what costs most is {worst}, {1 - kept[worst]:.0%}")
    if best["baseline_beyond_study"]:
        reasons.append("the batch of the one rank is smaller or larger than all of the study")
    return reasons


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("scaling advise", "Recommend ranks, batch, strategy and bucket size for a target; simulated.")
    add_network_flags(parser)
    add_target_flags(parser)
    add = parser.add_argument
    add("--workload", metavar="NAME", help="of the profile; not set: its first model")
    add("--ranks", type=positive_ints, default="1,2,4,8,16,32,64,128,256,512,1024", metavar="NUMBERS", help="allowed")
    add(
        "--global-batches",
        type=positive_ints,
        default=",".join(str(1 << power) for power in range(4, 16)),
        metavar="NUMBERS",
        help="samples of all ranks and step allowed",
    )
    add("--bucket-mb", type=positive_numbers, default="1,5,25", metavar="NUMBERS", help="bucket sizes in MiB allowed")
    add("--period", type=positive_int, default=8, metavar="N", help="of the local SGD shown beside")
    add("--min-efficiency", type=fraction, default=0.5, metavar="SHARE", help="of speed-up to accuracy ÷ ranks")
    add("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    check_writable("--json", options.json)
    return options
