"""What a study found, in plain sentences, each of which its runs bear out, and what it did not look at."""

from collections.abc import Sequence
from math import isinf

from benchmarks.hyperbola import Fit
from benchmarks.report.measures import Measured, at_edge_of_grid, fastest_serial, tuning_of
from benchmarks.report.words import count, listing, percent
from benchmarks.study.cells import OURS, SERIAL, TORCH
from benchmarks.study.results import Study
from benchmarks.table import format_number, format_range

__all__ = ["summarise_study"]

_FEWEST_SEEDS = 5
_MOST_NAMED = 5


def summarise_study(
    study: Study, cells: Sequence[Measured], fit: Fit | None = None, noise: Sequence[float] = ()
) -> list[str]:
    """Return paragraphs: the question, what was soonest, the peer, what batches do, misses, and what the result is not.

    `fit` is the study's hyperbola, `noise` the gradient noise scales of its runs, in samples.
    """
    if not cells:
        return [f"{_question(study)} No measured run is there yet."]
    batches = [] if fit is None else [_batches(fit, noise)]
    return [f"{_question(study)} {_soonest(cells)}", _peer(cells), *batches, _misses(cells), _limits(study, cells)]


def _question(study: Study) -> str:
    spec = study.head["spec"]
    what = f"does the model {spec['model']} reach" if "model" in spec else "is reached"
    where = f" on {spec['dataset']}" if "dataset" in spec else ""
    return f"How soon {what} a test accuracy of {percent(study.target_accuracy)}{where}?"


def _soonest(cells: Sequence[Measured]) -> str:
    best = min(cells, key=lambda each: each.seconds)
    if isinf(best.seconds):
        return "No method did so in the median of its runs, so there is no speed-up to report."
    sentences = [f"Soonest was {_named(best)}: {_time(best)}, evaluation left out."]
    serial = fastest_serial(cells)
    if serial is None:
        return " ".join([*sentences, "Serial SGD was not run, so that there is no speed-up to report."])
    if isinf(serial.seconds):
        missed = "Serial SGD missed the target at every batch that was tried, so that there is no speed-up to report."
        return " ".join([*sentences, missed])
    if best is serial:
        others = [each for each in cells if each.cell.contender != SERIAL and not isinf(each.seconds)]
        if not others:
            return " ".join([*sentences, "It is serial SGD (one rank, one thread)."])
        nearest = min(others, key=lambda each: each.seconds)
        sentences.append(
            "It is serial SGD (one rank, one thread), which nothing that was tried made sooner. "
            f"The nearest, {_named(nearest)}, took {format_number(nearest.seconds / serial.seconds)} times as long."
            f"{_overlap(serial, nearest)}"
        )
        return " ".join(sentences)
    sentences.append(f"That is {_times(best, serial)}: {_baseline(serial)}.{_overlap(best, serial)}")
    hardware, statistical = best.speed_up.hardware_efficiency, best.speed_up.statistical_efficiency
    if hardware is not None and statistical is not None:
        sentences.append(
            f"The factor is {format_number(hardware)} (samples per second) times {format_number(statistical)} "
            "(samples needed)."
        )
    synchronous = [each for each in cells if each.cell.contender == OURS and each.cell.strategy == "sync"]
    if synchronous:
        nearest = min(synchronous, key=lambda each: each.seconds)
        if nearest is not best and not isinf(nearest.seconds):
            sentences.append(
                f"Of synchronous SGD by this package, {_named(nearest)} was soonest: {_time(nearest)}, "
                f"{_times(nearest, serial)}.{_overlap(nearest, serial)}"
            )
    return " ".join(sentences)


def _peer(cells: Sequence[Measured]) -> str:
    peers = [each for each in cells if each.cell.contender == TORCH]
    if not peers:
        return "PyTorch's DDP was not part of this study."
    best = min(peers, key=lambda each: each.seconds)
    if isinf(best.seconds):
        return f"PyTorch's DDP over Gloo missed the target in most of its runs, at its best as {_named(best)}."
    name = f"PyTorch's DDP over Gloo, at its best as {_named(best)}," if len(peers) > 1 else "PyTorch's DDP over Gloo"
    sentence = f"{name} took {_time(best)}"
    serial = fastest_serial(cells)
    if serial is None or isinf(serial.seconds):
        return f"{sentence}."
    return f"{sentence}, {_times(best, serial)}.{_overlap(best, serial)}"


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
    networks = sorted({each.cell.network for each in cells if each.cell.network != "none"})
    place = "one machine" if not networks else f"hosts with links of {listing(networks)}"
    sentences = [
        f"This holds for one model and one data set on {place}, with {seeds} for each method; it does not say what "
        "other models, machines or more ranks would give."
    ]
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
    if str(study.head.get("commit")).endswith("-dirty"):
        sentences.append("The code differed from the commit that is named.")
    return " ".join(sentences)


def _named(each: Measured) -> str:
    return f"“{each.name}”"


def _time(each: Measured) -> str:
    n = f"median of {each.n} runs" if each.n > 1 else "1 run"
    return f"{format_range([run.seconds for run in each.runs])} s of training ({n})"


def _times(each: Measured, serial: Measured) -> str:
    times = format_number(each.speed_up.accuracy_over_best)
    spread = each.speed_up_range
    ends = "" if spread is None or each.n == 1 else f" [{format_number(spread[0])}–{format_number(spread[1])}]"
    slower = each.speed_up.accuracy_over_best is not None and each.speed_up.accuracy_over_best < 1
    verdict = ", and so slower" if slower else ""
    return f"{times}{ends} times as fast as serial SGD at its best batch ({serial.cell.global_batch_size:,}){verdict}"


def _baseline(serial: Measured) -> str:
    return f"one rank and one thread took {format_range([run.seconds for run in serial.runs])} s"


def _overlap(one: Measured, other: Measured) -> str:
    """Say so where the ranges over seeds overlap, since then the order of the two is open."""
    (a, b), (c, d) = (each.range(lambda run: run.seconds) for each in (one, other))
    return " Their ranges over seeds overlap, so that this difference is uncertain." if a <= d and c <= b else ""
