"""The table of a sweep: a row for every trial, best first, for people (Markdown) and for programs (CSV)."""

import csv
import io
from collections.abc import Sequence

from allreduce_sgd.sweep.results import Outcome
from allreduce_sgd.sweep.spec import METRICS, Spec, Value

__all__ = ["as_csv", "as_markdown"]


def as_markdown(spec: Spec, outcomes: Sequence[Outcome]) -> str:
    """Return the table with aligned columns; numbers with six significant digits at most."""
    several, halving = spec.seeds > 1, spec.halving
    unit = METRICS[spec.metric][1]
    metric = f"{spec.metric}, {unit}" if unit else spec.metric
    header = ["place", "trial", *(each.name for each in spec.parameters)]
    header += [f"{metric} (median of {spec.seeds})", "[min–max]"] if several else [metric]
    header += [halving.unit] if halving else []
    header += ["seconds", "failed"]
    rows = []
    for place, outcome in enumerate(outcomes, 1):
        value = outcome.value
        row = ["–" if value is None else str(place), str(outcome.trial.number)]
        row += [_text(each) for each in outcome.trial.parameters.values()]
        row += ["–" if value is None else _text(value)]
        if several:
            values = outcome.values
            row += [f"[{_text(min(values))}–{_text(max(values))}]" if values else "–"]
        row += [str(outcome.reach)] if halving else []
        row += [f"{outcome.seconds:.1f}", outcome.error or ""]
        rows.append([cell.replace("|", "\\|") for cell in row])
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    # The last column tells of errors, at any length.
    lines = [header, ["-" * width for width in widths], *rows]
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n" for line in lines
    )


def as_csv(spec: Spec, outcomes: Sequence[Outcome]) -> str:
    """Return the table with all digits; `value` is the median over seeds, and empty where the trial failed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [each.name for each in spec.parameters]
    reach = [] if spec.halving is None else [spec.halving.unit]
    writer.writerow(["trial", *names, spec.metric, "min", "max", "seeds", *reach, "seconds", "error"])
    for outcome in outcomes:
        values = outcome.values
        ends: list[float | str] = [min(values), max(values)] if values else ["", ""]
        writer.writerow(
            [
                outcome.trial.number,
                *outcome.trial.parameters.values(),
                "" if outcome.value is None else outcome.value,
                *ends,
                len(values),
                *([] if spec.halving is None else [outcome.reach]),
                round(outcome.seconds, 3),
                outcome.error or "",
            ]
        )
    return file.getvalue()


def _text(value: Value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
