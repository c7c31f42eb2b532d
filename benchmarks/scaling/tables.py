"""The tables of all modes, for people. What is simulated says so."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scaling.profile import Profile
from benchmarks.table import format_number, format_table

__all__ = ["TARGET", "advice_table", "prediction_tables", "profile_table", "published_table", "validation_tables"]

TARGET = 0.1
"""The median error of step times that predictions may have."""

Row = Mapping[str, Any]


def profile_table(profile: Profile) -> str:
    """Return what was measured: workloads, prices of messages, the distribution of step times."""
    lines = [
        [
            each.workload,
            format_number(each.total_bytes / 1e6),
            *(_ms(part) for part in (each.forward_seconds, each.backward_seconds, each.optimizer_seconds)),
            f"{each.contention:.2f}",
        ]
        for each in profile.computes
    ]
    links = [
        [
            "longer" if limit is None else f"up to {limit:,} B",
            format_number(1e6 * cost.alpha_seconds),
            format_number(1e9 * cost.beta_seconds_per_byte),
            format_number(1e9 * cost.gamma_seconds_per_byte),
        ]
        for limit, cost in zip([*profile.link.limits_bytes, None], profile.link.costs, strict=True)
    ]
    handling = profile.handling
    codecs = ", ".join(f"{name} {1e9 * seconds:.2f} ns/B" for name, seconds in profile.codec_seconds_per_byte)
    return "\n\n".join(
        [
            f"measured: {profile.ranks} ranks on {profile.hosts} host{'s' * (profile.hosts > 1)}, "
            f"{profile.cores} cores, one thread a rank; milliseconds",
            format_table(["workload", "MB", "forward", "backward", "optimizer", "contention"], lines),
            format_table(["messages", "α µs", "β ns/B", "γ ns/B"], links),
            f"a call {1e6 * profile.call_seconds:.1f} µs; stragglers {profile.stragglers.describe()}; "
            f"handing over {1e6 * handling.hook_seconds:.2f} µs a parameter, "
            f"{1e9 * handling.seconds_per_byte:.2f} ns a byte, {1e6 * handling.bucket_seconds:.0f} µs a bucket"
            + (f"; codecs: {codecs}" if codecs else ""),
        ]
    )


def prediction_tables(rows: Sequence[Row], profile: Profile) -> str:
    """Return a table for each model, plan and scaling."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["plan"], row["scaling"]), []).append(row)
    parts = [f"SIMULATED from a profile of {profile.ranks} ranks; milliseconds per step; {rows[0]['network']}"]
    for (model, plan, scaling), mine in groups.items():
        header = ["ranks", "batch", "step", "compute", "slowest", "exposed", "samples/s", "efficiency", "all-reduce"]
        to_target = any("seconds_to_target" in row for row in mine)
        header += ["steps", "to target, s", "speed-up", "= hardware", "× statistical"] if to_target else []
        batch = "a rank's batch fixed" if scaling == "weak" else "all ranks' batch fixed"
        parts.append(
            f"simulated: {model}, {plan}, {scaling} scaling ({batch}), stragglers {mine[0]['stragglers']}\n\n"
            f"{format_table(header, [_prediction_line(row, to_target) for row in mine], 0)}"
        )
    parts += _notes(rows)
    if any(row["codec"] != "none" and row["codec_time"] == "assumed" for row in rows):
        parts.append("the codec's time is not measured but assumed")
    if any("baseline_batch" in row for row in rows):
        first = next(row for row in rows if "baseline_batch" in row)
        parts.append(
            f"target: {first['target']}; speed-up over one rank at its best batch, {first['baseline_batch']}"
            f"{', beyond those of the study' if first['baseline_beyond_study'] else ''}: "
            f"{format_number(first['baseline_seconds'])} s"
        )
    return "\n\n".join(parts)


def _prediction_line(row: Row, to_target: bool) -> list[str]:
    computing = row["forward_seconds"] + row["backward_seconds"] + row["optimizer_seconds"]
    parts = (row["step_seconds"], computing, row["straggler_seconds"], row["exposed_seconds"])
    line = [
        f"{row['ranks']:,}",
        format_number(row["batch_per_rank"]),
        *map(_ms, parts),
        format_number(row["samples_per_second"]),
        f"{row['scaling_efficiency']:.0%}",
        _how(row),
    ]
    if not to_target:
        return line
    if row.get("seconds_to_target") is None:
        return [*line, "∞", "∞", "0", "–", "–"]
    assumed = _assumed(row)
    return [
        *line,
        f"{assumed}{format_number(row['steps_to_target'])}",
        f"{assumed}{_seconds(row)}",
        f"{assumed}{format_number(row['speed_up_to_accuracy'])}",
        format_number(row["hardware_efficiency"]),
        f"{row['statistical_efficiency']:.3f}",
    ]


def _assumed(row: Row) -> str:
    return ("* " if row["beyond_study"] else "") + ("≈ " if row["steps_basis"] == "assumed" else "")


def _seconds(row: Row) -> str:
    """Return the seconds to the target, with their range where a fit has one."""
    if row["seconds_to_target"] is None:
        return "∞"
    low, high = row["seconds_to_target_range"]
    told = format_number(row["seconds_to_target"])
    return told if low == high else f"{told} [{format_number(low)}–{format_number(high)}]"


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what the marks of a table mean, where it has them."""
    notes = []
    if any(row.get("steps_basis") == "assumed" for row in rows):
        notes.append("≈: no run tells the steps of this method; assumed are those of synchronous SGD")
    if any(row.get("beyond_study") for row in rows):
        notes.append("*: smaller or larger than all batches of the study, whose curve is taken to go on")
    return notes


def _how(row: Row) -> str:
    told = [each for each in row["reduction_methods"] if each not in ("none", "simulated")]
    return "+".join(row["algorithms"]) + (f" ({', '.join(told)})" if told else "")


def validation_tables(rows: Sequence[Row]) -> str:
    """Return predicted beside measured, apart for more ranks than cores, and the median errors last."""
    mine = [row for row in rows if row["kind"] == "validation"]
    parts, ends = [], []
    for crowded in (False, True):
        chosen = [row for row in mine if (row["oversubscription"] is not None) == crowded]
        if not chosen:
            continue
        header = ["workload", "ranks", "hosts", "measured ms", "predicted", "error", "computing", "network"]
        lines = [
            [
                row["workload"],
                str(row["ranks"]),
                str(row["hosts"]),
                f"{_ms(row['measured_seconds'])} [{_ms(row['minimum_seconds'])}–{_ms(row['maximum_seconds'])}]",
                _ms(row["predicted_seconds"]),
                f"{row['error']:+.1%}",
                row["computing"],
                row["network"],
            ]
            for row in chosen
        ]
        heading = "at most as many ranks as cores"
        if crowded:
            heading = (
                f"more ranks than cores: predictions × {chosen[0]['oversubscription']:.2f}, measured on other sizes"
            )
        parts.append(f"{heading}\n\n{format_table(header, lines)}")
        for computing in dict.fromkeys(row["computing"] for row in chosen):
            errors = [abs(row["error"]) for row in chosen if row["computing"] == computing]
            middle = statistics.median(errors)
            ends.append(
                f"{'more ranks than cores' if crowded else 'ranks ≤ cores'}, computing {computing}: median |error| "
                f"{middle:.1%} of {len(errors)} cases, largest {max(errors):.1%}; target {TARGET:.0%}: "
                f"{'met' if middle <= TARGET else 'MISSED'}"
            )
    return "\n\n".join([*parts, "\n".join(ends)])


def published_table(rows: Sequence[Row]) -> str:
    header = ["source", "model", "GPUs", "MB", "step ms", "exposed ms", "simulated", "published", "off by"]
    lines = [
        [
            row["source"],
            row["model"],
            str(row["ranks"]),
            format_number(row["model_bytes"] / 1e6),
            _ms(row["step_seconds"]),
            _ms(row["exposed_seconds"]),
            f"{row['predicted_efficiency']:.0%}",
            f"{row['published_efficiency']:.0%}{' (check)' if row['check'] else ''}",
            f"{100 * (row['predicted_efficiency'] - row['published_efficiency']):+.0f} points",
        ]
        for row in rows
    ]
    notes = "\n".join(
        f"{row['source']}, {row['model']}, {row['ranks']} GPUs: {row['inputs']}. {row['comment']}" for row in rows
    )
    return f"scaling efficiency, SIMULATED against published\n\n{format_table(header, lines, 2)}\n\n{notes}"


def advice_table(rows: Sequence[Row]) -> str:
    """Return the recommendation, and what each alternative would cost."""
    header = [
        "choice",
        "ranks",
        "batch",
        "strategy",
        "bucket MiB",
        "to target, s",
        "rank-hours",
        "GB a rank",
        "efficiency",
    ]
    lines = [
        [
            row["choice"],
            f"{row['ranks']:,}",
            f"{row['global_batch']:,.0f}",
            row["plan"],
            format_number(row["bucket_mb"]),
            f"{_assumed(row)}{_seconds(row)}",
            format_number(row.get("rank_hours")),
            format_number(row.get("gigabytes_sent")),
            f"{row['accuracy_efficiency']:.0%}",
        ]
        for row in rows
    ]
    reasons = "\n".join(f"- {reason}" for reason in [*rows[0]["reasons"], *_notes(rows)])
    first = rows[0]
    return (
        f"SIMULATED: {first['model']}, {first['network']}; target: {first['target']}\n\n"
        f"{format_table(header, lines)}\n\n{reasons}"
    )


def _ms(seconds: float) -> str:
    return format_number(1e3 * seconds)
