"""What a record found, in a sentence or two, for the benchmarks whose rows have one question."""

import importlib
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from benchmarks.message_sizes import format_size
from benchmarks.report.sources import Record
from benchmarks.report.words import count, listing, percent, undecided
from benchmarks.table import format_number

__all__ = ["summarise_record"]

_Rows = Sequence[Mapping[str, Any]]

_ENDS = ("batch", "lr", "momentum", "optimizer")
_LEAST = ("epoch_time", "epochs_to_target")
"""The figures of the course whose curves are told by their last, and by their least, value."""
_PEERS = (("allreduce_sgd", "with this package"), ("torch_ddp_gloo", "with PyTorch's DDP over Gloo"))


def summarise_record(record: Record) -> str:
    """Return what the rows show; for other benchmarks, how many there are."""
    sentence = _SUMMARIES[record.benchmark](record) if record.benchmark in _SUMMARIES else ""
    return sentence or f"{count(len(record.rows), 'row').capitalize()}; see the section."


def _steps(record: Record) -> str:
    """Say what a step costs with communication over one without, ours beside torch's."""

    def tell(rows: _Rows) -> list[str]:
        ratios = {row["contender"]: format_number(row["ratio"]) for row in rows}
        return [f"{ratios[who]} times as long {what}" for who, what in _PEERS if who in ratios]

    told = _by_workload(record, tell)
    return f"Beside one that does not communicate, a training step takes {told}." if told else ""


def _by_workload(record: Record, tell: Callable[[_Rows], list[str]]) -> str:
    """Return what `tell` says of the rows of each workload, which may be nothing."""
    told = {
        workload: tell([row for row in record.rows if row["workload"] == workload])
        for workload in dict.fromkeys(row["workload"] for row in record.rows)
    }
    return "; ".join(f"{listing(parts)} ({workload})" for workload, parts in told.items() if parts)


def _strategies(record: Record) -> str:
    """Say which case of each study was the most accurate at the end, and how many runs diverged."""
    sentences = []
    for study in dict.fromkeys(row["study"] for row in record.rows):
        rows = [row for row in record.rows if row["study"] == study]
        best = max(rows, key=_accuracy)
        runs = [len(row["test_accuracies"]) for row in rows]
        diverged = sum(row["diverged"] for row in rows)
        of_each = count(runs[0], "run") if len(set(runs)) == 1 else f"{min(runs)} to {max(runs)} runs"
        sentence = (
            f"Study {study}: of {count(len(rows), 'case')} with {of_each} each, “{best['case']}” was the most "
            f"accurate at the end, {percent(round(_accuracy(best), 4))}"
        )
        others = sorted((row for row in rows if row is not best), key=_accuracy, reverse=True)
        if others:
            sentence += f", and “{others[-1]['case']}” the least, {percent(round(_accuracy(others[-1]), 4))}"
        # No other has a higher median, so that only its lower end may be passed.
        near = [row for row in others if max(row["test_accuracies"]) >= min(best["test_accuracies"])]
        sentences += [f"{sentence}.", undecided(best["case"], [row["case"] for row in near])]
        sentences.append(f"{diverged} of {sum(runs)} runs diverged." if diverged else "")
    return " ".join(filter(None, sentences))


def _simulation(record: Record) -> str:
    """Say how far predictions of held-out sizes were off, without more ranks than cores."""
    errors = [
        abs(row["error"])
        for row in record.rows
        if row["kind"] == "measured" and not row["fitted"] and row["oversubscription"] is None
    ]
    if not errors:
        return ""
    return (
        f"Predictions of times that were not fitted are off by {100 * statistics.median(errors):.0f} % in the median "
        f"and by {100 * max(errors):.0f} % at most (n = {len(errors)}, at most as many ranks as cores). "
        "Other times of many ranks are simulated, not measured."
    )


def _collectives(record: Record) -> str:
    """Give the times of the largest all-reduce, of the fastest of ours and of each peer, for each variant of the call.

    Rows with wrong results, or whose data went another way than the links, are named and left out.
    """
    rows = [row for row in record.rows if row["op"] == "all_reduce"]
    sound = [row for row in rows if not row["wrong"] and not row["bypass"]]
    sentences = []
    if sound:
        largest = max(row["bytes"] for row in sound)
        here = sorted((row for row in sound if row["bytes"] == largest), key=lambda row: row["median_seconds"])
        soonest: dict[str, float] = {}
        for row in here:
            who = "this package" if row["ours"] else row["contender"]
            soonest.setdefault(f"{who} ({row['variant'].replace('_', ' ')})", 1e3 * row["median_seconds"])
        told = listing([f"{format_number(time)} ms with {name}" for name, time in soonest.items()])
        where = "on one machine" if here[0]["hosts"] == 1 else f"on {here[0]['hosts']} hosts"
        sentences.append(
            f"An all-reduce of {format_size(largest)} among {count(here[0]['ranks'], 'rank')} {where} takes "
            f"{told}, in the median of {count(here[0]['rounds'], 'round')}."
        )
    for what, unsound in (
        ("for wrong results", sum(row["wrong"] > 0 for row in rows)),
        ("as more bytes passed than the links carry", sum(bool(row["bypass"] and not row["wrong"]) for row in rows)),
    ):
        if unsound:
            sentences.append(f"Left out {what}: {unsound} of {count(len(rows), 'row')}.")
    return " ".join(sentences)


def _compression(record: Record) -> str:
    """Say how many codecs stayed within a point of accuracy, and what the smallest of these sends."""
    codecs = [row for row in record.rows if row["codec"] != "none"]
    close = [row for row in codecs if row["close"]]
    if not close:
        return ""
    best = max(close, key=lambda row: row["ratio"])
    runs = len(best["test_accuracies"])
    return (
        f"{len(close)} of {count(len(codecs), 'codec')} ended at most 1 point of accuracy below training without one, "
        f"in the median of {count(runs, 'run')}; of these, {best['codec']} sends least: its bytes are "
        f"1/{format_number(best['ratio'])} of those sent without."
    )


def _scaling(record: Record) -> str:
    """Say how far predicted step times were from measured ones, and how many points are simulated."""
    sentences = _profile(record)
    validated = [row for row in record.rows if row["kind"] == "validation"]
    places = ((False, "with at most as many ranks as cores"), (True, "with more ranks than cores"))
    ways = (("modelled", "predicted from other models and batches"), ("measured", "given their computing alone"))
    for (crowded, where), (computing, how) in itertools.product(places, ways):
        errors = [
            abs(row["error"])
            for row in validated
            if (row["oversubscription"] is not None) == crowded and row["computing"] == computing
        ]
        if errors:
            sentences.append(
                f"Step times {how} are off by {100 * statistics.median(errors):.1f} % in the median and by "
                f"{100 * max(errors):.1f} % at most {where} ({count(len(errors), 'case')})."
            )
    ranks = [row["ranks"] for row in record.rows if row["kind"] == "prediction"]
    if ranks:
        sentences.append(f"{count(len(ranks), 'point')} of up to {max(ranks):,} ranks: simulated, not measured.")
    advice = {row["choice"]: row for row in record.rows if row["kind"] == "advice"}
    for choice in ("recommended", "soonest, at any cost"):
        if choice in advice:
            row = advice[choice]
            sentences.append(
                f"Simulated, not measured, {choice}: {count(row['ranks'], 'rank')} with batch "
                f"{row['global_batch']:,.0f}{', beyond those of the study,' if row.get('beyond_study') else ''} reach "
                f"the target in {format_number(row['seconds_to_target'])} s, "
                f"{format_number(row['speed_up_to_accuracy'])} times as soon as one rank at its best batch."
            )
    return " ".join(sentences)


def _profile(record: Record) -> list[str]:
    """Say what was measured for predictions to start from, in a record that holds nothing else."""
    parts = [row for row in record.rows if row["kind"] == "profile"]
    machines = [row for row in parts if row["part"] == "machine"]
    if not machines or len(parts) < len(record.rows):
        return []
    names = listing([row["workload"] for row in parts if row["part"] == "compute"])
    where = f"{count(machines[0]['ranks'], 'rank')} on {count(machines[0]['cores'], 'core')}"
    return [f"Measured, to predict from: computing of {names}, and all-reduces, with {where}."]


def _course(record: Record) -> str:
    """Say where the curves of each figure end, or at which x they are lowest; the others are named."""
    sentences, drawn = [], []
    for figure in dict.fromkeys(row["figure"] for row in record.rows):
        rows = [row for row in record.rows if row["figure"] == figure]
        title = str(rows[0].get("title") or figure)
        if figure not in _ENDS and figure not in _LEAST:
            drawn.append(title)
            continue
        where = ", at the end" if figure in _ENDS else f", least {rows[0]['y_label']}"
        sentences.append(f"{title}{where}: {listing(_points(rows, figure in _LEAST))}.")
    return " ".join([*sentences, f"Drawn: {'; '.join(drawn)}." if drawn else ""]).strip()


def _points(rows: _Rows, least: bool) -> list[str]:
    """Return the last, or least, value of each curve, in ascending order."""
    ends = []
    for row in rows:
        values = [math.inf if value is None else value for value in row["y"]]
        place = values.index(min(values)) if least else len(values) - 1
        at = f" at {row['x'][place]:,g}" if least and not math.isinf(values[place]) else ""
        ends.append((values[place], f"{format_number(values[place])}{at} with {row['series']}"))
    return [told for _, told in sorted(ends)]


def _layer_costs(record: Record) -> str:
    return str(importlib.import_module("benchmarks.layer_costs").summary(record.rows)).replace("\n", " ")


def _chaos(record: Record) -> str:
    """Say how often a run was started, harmed and resumed, and whether each came to the same parameters."""
    rounds, resumed, finished = (sum(row[name] for row in record.rows) for name in ("rounds", "resumed", "finished"))
    harmed = sum(row["rounds"] for row in record.rows if row["harm"] != "none")
    ends = [row["slowest_end_seconds"] for row in record.rows if row["slowest_end_seconds"] is not None]
    problems = sum(len(row["problems"]) for row in record.rows)
    slowest = f"; the slowest ended {format_number(max(ends))} s after the harm" if ends else ""
    return (
        f"A training was started {count(rounds, 'time')}, harmed in {harmed} of these starts and resumed from a "
        f"checkpoint in {resumed}{slowest}. {count(finished, 'run').capitalize()} came to the end with the parameters "
        f"of the undisturbed one, bit for bit. Problems: {problems or 'none'}."
    )


def _local_steps(record: Record) -> str:
    """Say what a step costs for each period, over one that never exchanges."""

    def tell(rows: _Rows) -> list[str]:
        return [
            f"{format_number(row['ratio'])} times as long with an average {_every(row['period'])}"
            + (f", {count(row['delay'], 'step')} late" if row["delay"] else "")
            for row in rows
            if row["period"] is not None
        ]

    told = _by_workload(record, tell)
    return f"Beside one that never exchanges, a step takes {told}." if told else ""


def _every(period: int) -> str:
    return "after every step" if period == 1 else f"every {period} steps"


def _recipes(record: Record) -> str:
    """Say how many of the course's expectations were seen, and name those that were not."""
    missed = [row for row in record.rows if row["held"] < len(row["smaller_values"])]
    seen = f"{len(record.rows) - len(missed)} of {count(len(record.rows), 'expectation')} were seen."
    return " ".join([seen, *(f"Not seen: “{row['claim']}” ({row['recipe']})." for row in missed)])


def _startup(record: Record) -> str:
    """Say how long ranks take until the end of their first step, and what takes longest of it."""
    seconds = {row["phase"]: row["median_seconds"] for row in record.rows}
    first = record.rows[0]
    parts = [phase for phase in seconds if phase not in ("total", "help", "interpreter")]
    longest = max(parts, key=lambda phase: seconds[phase])
    return (
        f"{count(first['ranks'], 'rank').capitalize()} end their first step on {first['dataset']} "
        f"{format_number(seconds['total'])} s after the launch (median of {count(first['rounds'], 'round')}); the "
        f"longest part is {longest}, {format_number(seconds[longest])} s. --help takes "
        f"{format_number(seconds['help'])} s."
    )


def _virtual_ranks(record: Record) -> str:
    """Say what bits that do not depend on the number of ranks cost, over synchronous SGD."""

    def tell(rows: _Rows) -> list[str]:
        return [
            f"{format_number(row['ratio'])} times as long with {row['virtual_ranks']} of them"
            for row in rows
            if row["virtual_ranks"] is not None
        ]

    told = _by_workload(record, tell)
    wrong = sum(row["wrong"] for row in record.rows)
    bits = f"{count(wrong, 'case')} ended in wrong bits" if wrong else "all ended in the bits they should"
    return f"With virtual ranks, a step takes, beside synchronous SGD, {told}; {bits}." if told else ""


def _accuracy(row: Mapping[str, Any]) -> float:
    return statistics.median(row["test_accuracies"])


_SUMMARIES: Mapping[str, Callable[[Record], str]] = MappingProxyType(
    {
        "step_time": _steps,
        "strategies": _strategies,
        "simulation": _simulation,
        "collectives": _collectives,
        "compression": _compression,
        "scaling": _scaling,
        "course": _course,
        "layer_costs": _layer_costs,
        "chaos": _chaos,
        "local_steps": _local_steps,
        "recipes": _recipes,
        "startup": _startup,
        "virtual_ranks": _virtual_ranks,
    }
)
