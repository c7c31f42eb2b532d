"""What a study found, in plain sentences, each of which its runs bear out, and what it did not look at."""

from collections.abc import Mapping, Sequence
from math import isinf
from types import MappingProxyType

from benchmarks.hyperbola import Fit
from benchmarks.report.measures import Measured, at_edge_of_grid, fastest_serial, tuning_of
from benchmarks.report.words import count, listing, percent, undecided
from benchmarks.speedup import by_cell
from benchmarks.study.cells import ALL_CORES, OURS, SERIAL, TORCH
from benchmarks.study.results import Study
from benchmarks.table import format_number, format_range

__all__ = ["summarise_study"]

_FEWEST_SEEDS = 5
_MOST_NAMED = 5
# Where a spec asks for a contender.
_ASKED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {SERIAL: ("baselines", "serial_batches"), TORCH: ("baselines", "torch_ddp"), OURS: ("grid", "strategies")}
)


def summarise_study(
    study: Study, cells: Sequence[Measured], fit: Fit | None = None, noise: Sequence[float] = ()
) -> list[str]:
    """Return paragraphs: question, what was soonest, ours, the peer, what batches do, misses, what the result is not.

    `fit` is the study's hyperbola, `noise` the gradient noise scales of its runs, in samples.
    """
    question = f"{_question(study)}{_unfinished(study)}"
    if not cells:
        return [f"{question} No measured run is there yet."]
    paragraphs = [
        f"{question} {_soonest(study, cells)}",
        _ours(study, cells),
        _peer(study, cells),
        "" if fit is None else _batches(fit, noise),
        _misses(cells),
        _limits(study, cells),
    ]
    return list(filter(None, paragraphs))


def _question(study: Study) -> str:
    spec = study.head["spec"]
    what = f"does the model {spec['model']} reach" if "model" in spec else "is reached"
    where = f" on {spec['dataset']}" if "dataset" in spec else ""
    return f"How soon {what} a test accuracy of {percent(study.target_accuracy)}{where}?"


def _unfinished(study: Study) -> str:
    """Say how many measured runs are missing, of the cells that have any run."""
    seeds = study.head["spec"].get("seeds", 0)
    begun, measured = {run.cell for run in study.runs}, by_cell(study.runs)
    missing = sum(max(0, seeds - len(measured.get(cell, ()))) for cell in begun)
    if not missing:
        return ""
    return (
        f" This study is unfinished: it lacks {missing} of the {seeds * len(begun)} measured runs of the methods that "
        "it has begun."
    )


def _soonest(study: Study, cells: Sequence[Measured]) -> str:
    best = _first(cells)
    if isinf(best.seconds):
        return "No method did so in the median of its runs, so there is no speed-up to report."
    sentences = [f"Soonest was {_named(best)}: {_time(best)}, evaluation left out."]
    if best.cell.contender == SERIAL:
        sentences.append(_serial_won(best, cells))
    else:
        if best.cell.contender == ALL_CORES:
            sentences.append(f"It is a baseline on one rank, with {count(best.cell.threads, 'thread')}.")
        sentences.append(_gain(study, best, cells))
    uncertain = sorted((each for each in cells if each is not best and _overlap(best, each)), key=_seconds)
    sentences.append(undecided(best.name, [each.name for each in uncertain if not isinf(each.seconds)]))
    return " ".join(filter(None, sentences))


def _serial_won(serial: Measured, cells: Sequence[Measured]) -> str:
    others = [each for each in cells if each.cell.contender != SERIAL and not isinf(each.seconds)]
    if not others:
        return "It is a baseline on one rank, serial SGD (one rank, one thread)."
    nearest = _first(others)
    return (
        "It is a baseline on one rank, serial SGD (one rank, one thread), which nothing that was tried made sooner. "
        f"The nearest, {_named(nearest)}, took {format_number(nearest.seconds / serial.seconds)} times as long."
    )


def _gain(study: Study, best: Measured, cells: Sequence[Measured]) -> str:
    """Say what the soonest, which is not serial SGD, gains over it."""
    serial = fastest_serial(cells)
    if serial is None:
        return f"{_absent(study, SERIAL, 'Serial SGD')}, so that there is no speed-up to report."
    if isinf(serial.seconds):
        return (
            "Serial SGD missed the target at every batch that was tried, in the median of its runs, so that there is "
            "no speed-up to report."
        )
    sentence = f"That is {_times(best, serial)}: {_baseline(serial)}."
    hardware, statistical = best.speed_up.hardware_efficiency, best.speed_up.statistical_efficiency
    if hardware is None or statistical is None:
        return sentence
    return (
        f"{sentence} The factor is {format_number(hardware)} (samples per second) times {format_number(statistical)} "
        "(samples needed)."
    )


def _ours(study: Study, cells: Sequence[Measured]) -> str:
    """Name this package's soonest method and its soonest synchronous one, where they are not the soonest of all."""
    ours = [each for each in cells if each.cell.contender == OURS]
    if not ours:
        return f"{_absent(study, OURS, 'This package on several ranks')}."
    best, winner = _first(ours), _first(cells)
    if isinf(winner.seconds):
        return ""
    if isinf(best.seconds):
        return "No method of this package on several ranks reached the target in the median of its runs."
    sentences = []
    if best is not winner:
        told = _against_serial(best, cells)
        sentences.append(f"Of this package on several ranks, {_named(best)} was soonest: {told}")
    synchronous = [each for each in ours if each.cell.strategy == "sync" and not isinf(each.seconds)]
    if synchronous and best.cell.strategy != "sync":
        nearest = _first(synchronous)
        told = _against_serial(nearest, cells)
        sentences.append(f"Of synchronous SGD by this package, {_named(nearest)} was soonest: {told}")
    return " ".join(sentences)


def _peer(study: Study, cells: Sequence[Measured]) -> str:
    peers = [each for each in cells if each.cell.contender == TORCH]
    if not peers:
        absent = _absent(study, TORCH, "PyTorch's DDP")
        return f"{absent}."
    best = _first(peers)
    if isinf(best.seconds):
        where = f", in any of its {len(peers)} settings" if len(peers) > 1 else ""
        return f"PyTorch's DDP over Gloo did not reach the target in the median of its runs{where}."
    name = f"PyTorch's DDP over Gloo, at its best as {_named(best)}," if len(peers) > 1 else "PyTorch's DDP over Gloo"
    return f"{name} took {_against_serial(best, cells)}"


def _absent(study: Study, contender: str, name: str) -> str:
    """Say why there is nothing to tell of a contender: it was not asked for, or nothing of it was measured."""
    part, key = _ASKED[contender]
    asked = study.head["spec"].get(part, {}).get(key) or any(run.cell.contender == contender for run in study.runs)
    return f"{name} has no measured run" if asked else f"{name} was not part of this study"


def _batches(fit: Fit, noise: Sequence[float]) -> str:
    """Say what a larger batch still saves, and what the noise scale had told of it."""
    s_min, b_crit = (
        f"{format_number(value)} [{'–'.join(map(format_number, ends))}]"
        for value, ends in ((fit.s_min, fit.s_min_range), (fit.b_crit, fit.b_crit_range))
    )
    sentences = [
        "Serial and synchronous SGD with batch B take S_min (1 + B_crit / B) steps to the target, with S_min = "
        f"{s_min} and B_crit = {b_crit} samples (95 % ranges, {count(fit.n, 'run')}): batches below B_crit cost steps, "
        "batches above it samples."
    ]
    if noise:
        sentences.append(
            f"The gradient noise scale, which is to foretell B_crit, was {format_range(noise)} samples "
            f"in {count(len(noise), 'run')}."
        )
    return " ".join(sentences)


def _misses(cells: Sequence[Measured]) -> str:
    total, missed = sum(each.n for each in cells), sum(each.missed for each in cells)
    if not missed:
        return f"All {total} measured runs reached the target." if total > 1 else "The only run reached the target."
    who = [f"{_named(each)} ({each.missed} of {each.n})" for each in cells if each.missed]
    if len(who) > _MOST_NAMED:
        who = [*who[:_MOST_NAMED], f"{len(who) - _MOST_NAMED} more"]
    tail = "It counts as infinitely long." if missed == 1 else "They count as infinitely long."
    return f"{missed} of {count(total, 'measured run')} missed the target: {listing(who)}. {tail}"


def _limits(study: Study, cells: Sequence[Measured]) -> str:
    """Say what bounds the result: place, seeds, tuning, a busy machine, code that differed from the commit."""
    low, high = min(each.n for each in cells), max(each.n for each in cells)
    seeds = count(high, "seed") if low == high else f"{low} to {high} seeds"
    machine = study.head.get("machine") or {}
    cores = machine.get("cores")
    sentences = [
        f"This holds for one model and one data set on one machine, with {seeds} for each method; it does not say what "
        "other models, machines or more ranks would give."
    ]
    linked = [each for each in cells if each.cell.network != "none"]
    if linked:
        rates = listing(sorted({each.cell.network for each in linked}))
        sentences.append(
            f"{len(linked)} of {count(len(cells), 'method')} ran on virtual hosts, network namespaces of this "
            f"machine, with links limited to {rates}."
        )
    if low < _FEWEST_SEEDS:
        sentences.append(f"Fewer than {_FEWEST_SEEDS} seeds tell little about the spread.")
    spent = {tuning_of(study, each.cell).runs for each in cells}
    if len(spent) > 1:
        sentences.append(f"Tuning was not equal: between {min(spent)} and {max(spent)} runs for each method.")
    edge = sum(at_edge_of_grid(study, each) for each in cells)
    if edge:
        verb = "is" if edge == 1 else "are"
        sentences.append(
            f"The learning {'rate' if edge == 1 else 'rates'} chosen for {edge} of {count(len(cells), 'method')} "
            f"{verb} the smallest or largest of those tried, so that others may be better."
        )
    crowded = [each for each in cells if isinstance(cores, int) and each.cores_used > cores]
    if crowded:
        sentences.append(
            f"{count(len(crowded), 'method')} ran more threads than the machine has cores ({cores}): the seconds of "
            f"{'this one' if len(crowded) == 1 else 'these'} tell of the scheduler, the samples do not."
        )
    commits = {run.commit or study.head.get("commit") for run in study.runs}
    if any(str(commit).endswith("-dirty") for commit in commits):
        sentences.append("The code differed from the commit that is named.")
    return " ".join(sentences)


def _first(cells: Sequence[Measured]) -> Measured:
    return min(cells, key=_seconds)


def _seconds(each: Measured) -> float:
    return each.seconds


def _named(each: Measured) -> str:
    return f"“{each.name}”"


def _time(each: Measured) -> str:
    n = f"median of {each.n} runs" if each.n > 1 else "1 run"
    return f"{format_range([run.seconds for run in each.runs])} s of training ({n})"


def _against_serial(each: Measured, cells: Sequence[Measured]) -> str:
    """Return the time of a cell that is not the soonest, beside serial SGD where that came to the target."""
    serial = fastest_serial(cells)
    if serial is None or isinf(serial.seconds):
        return f"{_time(each)}."
    uncertain = " Their ranges over seeds overlap, so that this difference is uncertain."
    return f"{_time(each)}, {_times(each, serial)}.{uncertain if _overlap(each, serial) else ''}"


def _times(each: Measured, serial: Measured) -> str:
    times = format_number(each.speed_up.accuracy_over_best)
    spread = each.speed_up_range
    ends = "" if spread is None or each.n == 1 else f" [{format_number(spread[0])}–{format_number(spread[1])}]"
    slower = each.speed_up.accuracy_over_best is not None and each.speed_up.accuracy_over_best < 1
    verdict = ", and so slower" if slower else ""
    return f"{times}{ends} times as fast as serial SGD at its best batch ({serial.cell.global_batch_size:,}){verdict}"


def _baseline(serial: Measured) -> str:
    return f"one rank and one thread took {format_range([run.seconds for run in serial.runs])} s"


def _overlap(one: Measured, other: Measured) -> bool:
    """Say whether the ranges over seeds overlap, since then the order of the two is open."""
    (a, b), (c, d) = (each.range(lambda run: run.seconds) for each in (one, other))
    return a <= d and c <= b
