"""The section of a record that a benchmark wrote: its own figures where it has any, and its rows as tables."""

import importlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from allreduce_sgd.errors import ConfigError, quoted
from allreduce_sgd.user_code import describe
from benchmarks.report.content import Picture, Section
from benchmarks.report.record_summary import summarise_record
from benchmarks.report.record_tables import group_names, points_name, record_tables, table_name
from benchmarks.report.sources import Record, Source, facts_of
from benchmarks.report.step_times import contender_name, draw_step
from benchmarks.report.styles import save
from benchmarks.report.words import listing
from benchmarks.table import format_number, format_range

__all__ = ["record_section"]

Rows = Sequence[dict[str, Any]]

# Whose rows a picture of the scaling model shows, by its file; the others show predictions.
_SCALING_KINDS: Mapping[str, str] = MappingProxyType(
    {"scaling_validation": "validation", "scaling_published": "published"}
)


def record_section(source: Source, record: Record, figures: Path) -> Section:
    """Draw the record's figures into the folder, and return its section."""
    try:
        facts = facts_of(source)
        pictures = _DRAWN.get(record.benchmark, _draw_nothing)(source.name, record.rows, figures)
        summary = summarise_record(record)
        tables = record_tables(source.name, record)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        what = f"not a record of {quoted(record.benchmark)}"
        raise ConfigError(f"{source.path}: {what}: {describe(problem)}") from problem
    title = f"Benchmark {record.benchmark}"
    if source.path.stem != record.benchmark:
        title += f": {source.path.stem}"
    return Section(source.name, title, tuple(facts), (summary,), tuple(pictures), tuple(tables))


def _draw_nothing(_name: str, _rows: Rows, _figures: Path) -> list[Picture]:
    return []


def _draw_steps(name: str, rows: Rows, figures: Path) -> list[Picture]:
    pictures = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        here = [row for row in rows if row["workload"] == workload]
        picture = f"{name}-{_slug(workload)}"
        save(draw_step(workload, here), figures, picture)
        differing = " Waiting that a contender does not tell is what its backward pass takes beyond the one without."
        caption = f"What a training step of {workload} is made of, and the whole step with [min–max].{differing}"
        seen = "; ".join(f"{contender_name(row)} {format_number(1e3 * row['median_seconds'])} ms" for row in here)
        pictures.append(Picture(picture, caption, f"Stacked times of a step of {workload}: {seen}.", f"{name}-rows"))
    return pictures


def _draw_course(name: str, rows: Rows, figures: Path) -> list[Picture]:
    draw = importlib.import_module("benchmarks.course.figure").draw
    pictures = []
    for place, which in enumerate(dict.fromkeys(row["figure"] for row in rows)):
        here = [row for row in rows if row["figure"] == which]
        picture = f"{name}-{_slug(which)}"
        draw(here, figures / f"{picture}.png")
        notes = " ".join(dict.fromkeys(str(row["note"]) for row in here if row.get("note")))
        axes = f"{here[0]['y_label']} against {here[0]['x_label']}"
        caption = f"{here[0].get('title') or which}: {axes}. {notes}".strip()
        seen = f"{axes}, a line for each of {listing([str(row['series']) for row in here])}."
        pictures.append(Picture(picture, caption, seen, points_name(name, place)))
    return pictures


def _draw_layer_costs(name: str, rows: Rows, figures: Path) -> list[Picture]:
    importlib.import_module("benchmarks.layer_costs_plot").draw(rows, figures / f"{name}-layers.png")
    models = listing(list(dict.fromkeys(str(row["model"]) for row in rows)))
    per_byte: dict[str, list[float]] = {}
    for row in rows:
        if row["flops"] is not None:
            per_byte.setdefault(row["kind"], []).append(row["batch_size"] * row["flops"] / row["bytes"])
    told = "; ".join(f"{kind} layers do {format_range(ratios)} FLOPs per byte" for kind, ratios in per_byte.items())
    caption = f"Bytes to reduce against FLOPs, a point for each layer of {models}."
    seen = f"Bytes against FLOPs of the layers of {models}: {told}."
    return [Picture(f"{name}-layers", caption, seen, table_name(name, 0))]


def _draw_scaling(name: str, rows: Rows, figures: Path) -> list[Picture]:
    draw = importlib.import_module("benchmarks.scaling.figures").draw
    groups = group_names(rows)
    pictures = []
    # In a folder of its own: the names of its files are not ours to choose.
    with tempfile.TemporaryDirectory(dir=figures) as folder:
        for path, caption in draw(rows, Path(folder)):
            kind = _SCALING_KINDS.get(Path(path).stem, "prediction")
            picture = f"{name}-{_slug(Path(path).stem)}"
            Path(path).replace(figures / f"{picture}.png")
            pictures.append(Picture(picture, caption, caption, table_name(name, groups.index(f"kind {kind}"))))
    return pictures


def _slug(text: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-") or "figure"


_DRAWN: Mapping[str, Callable[[str, Rows, Path], list[Picture]]] = MappingProxyType(
    {"step_time": _draw_steps, "course": _draw_course, "layer_costs": _draw_layer_costs, "scaling": _draw_scaling}
)
