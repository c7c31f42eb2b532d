"""What a report says of records: their rows as tables, what null means in them, and where their figures lead."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.course.__main__ import main as course_main
from benchmarks.course.runs import Course, Job
from benchmarks.report.__main__ import main
from tests.benchmarks.report_files import Page, markdown_rows
from tests.benchmarks.synthetic_study import LAYERS, course_row, write_record


def test_a_record_of_any_benchmark_becomes_tables(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "a", "name": "x", "half_seconds": 0.25e-3, "values": [1.0, 2.0], "same": 3, "none": None, "ok": True},
        {"kind": "a", "name": "y", "half_seconds": None, "values": [], "same": 3, "none": None, "ok": False},
        {"kind": "b", "size_bytes": 4096},
    ]
    record = write_record(tmp_path / "new.json", "unheard_of", rows)
    assert main([str(record), "-o", str(tmp_path / "out")]) == 0
    first, second = markdown_rows(tmp_path / "out" / "tables" / "new-rows.md")
    assert first == {"name": "x", "half (µs)": "250", "values": "1.00, 2.00", "ok": "yes"}
    assert second == {"name": "y", "half (µs)": "–", "values": "–", "ok": "no"}
    assert "In all rows: same 3; none –." in (tmp_path / "out" / "tables" / "new-rows.md").read_text()
    assert markdown_rows(tmp_path / "out" / "tables" / "new-rows-2.md") == [{"size bytes": "4,096"}]


def test_the_course_has_a_figure_and_tables_for_each_of_its_figures(tmp_path: Path) -> None:
    lines = (("lr", "0.1"), ("lr", "0.2"), ("momentum", "0"), ("ball", "measured"))
    rows = [*(course_row(figure, series) for figure, series in lines), course_row("ball", "theory", low=None, n=None)]
    record = write_record(tmp_path / "course.json", "course", rows)
    assert main([str(record), "-o", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert [image["alt"] for image in page.all("img")] == [
        f"loss (nats) against samples, a line for each of {series}."
        for series in ("0.1 and 0.2", "0", "measured and theory")
    ]
    tables = tmp_path / "out" / "tables"
    assert [row["runs"] for row in markdown_rows(tables / "course-rows.md")] == [
        f"{series}-seed0, {series}-seed1" for series in ("0.1", "0.2")
    ]
    points = markdown_rows(tables / "course-points.md")
    assert list(points[0]) == ["series", "samples", "loss (nats)", "low", "high", "n"]
    assert list(points[0].values()) == ["0.1", "1", "0.600", "0.500", "0.700", "2"]
    assert list(points[1].values()) == ["0.1", "2", "0.300", "0.250", "∞", "2"]
    assert [row["series"] for row in points] == ["0.1", "0.1", "0.2", "0.2"]
    assert [(row["low"], row["n"]) for row in markdown_rows(tables / "course-points-3.md")[2:]] == [("–", "–")] * 2
    links = [str(link["href"]) for link in page.all("a") if "points" in str(link["href"])]
    assert links == ["#table-course-points", "#table-course-points-2", "#table-course-points-3"]


def test_rows_of_the_course_name_data_and_model_where_they_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(course: Course, job: Job, seed: int) -> None:
        (folder := course.folder(job, seed)).mkdir()
        (folder / "metrics.jsonl").write_text('{"event": "train", "samples": 256, "loss": 0.5}\n')

    monkeypatch.setattr(Course, "run", trained)
    monkeypatch.setattr("benchmarks.course.figures.noise_ball", lambda chains: [course_row("noise_ball", "measured")])
    record = tmp_path / "course.json"
    flags = ["--dataset", "synthetic:64,8,2", "--hidden", "4", "--seeds", "1", "--output", str(tmp_path / "runs")]
    assert course_main(["momentum", "noise_ball", *flags, "--json", str(record)]) == 0
    rows = json.loads(record.read_text())["rows"]
    named = [{key: row[key] for key in ("dataset", "model", "hidden") if key in row} for row in rows]
    assert named == [{"dataset": "synthetic:64,8,2", "model": "mlp", "hidden": "4"}] * 3 + [{}]
    assert main([str(record), "-o", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "tables" / "course-rows.md").read_text()
    assert "In all rows: dataset synthetic:64,8,2; model mlp; hidden 4;" in table


def test_every_layer_is_in_the_table_of_its_figure(report: Path) -> None:
    (table,) = (report / "tables").glob("layer-costs-*")
    assert [row["kind"] for row in markdown_rows(table)] == [row["kind"] for row in LAYERS]
    (alternative,) = (
        str(image["alt"])
        for image in Page((report / "index.html").read_text()).all("img")
        if "FLOPs" in str(image["alt"])
    )
    assert alternative == (
        "Bytes against FLOPs of the layers of cnn: convolution layers do 17,600 [3,200–32,000] FLOPs per byte; fully "
        "connected layers do 48.0 FLOPs per byte."
    )


def test_a_figure_of_the_scaling_model_is_linked_to_the_rows_it_shows(report: Path) -> None:
    text = (report / "index.html").read_text()
    for figure, table in (("speed-up", "scaling-rows-2"), ("validation", "scaling-rows")):
        after = text.partition(f'id="figure-scaling-scaling-{figure}"')[2]
        assert after.partition('href="#table-')[2].startswith(f'{table}"')


def test_null_is_infinity_where_a_record_means_that_something_never_came(tmp_path: Path) -> None:
    missed = {"reached": False, "seconds": None, "wall_seconds": None, "samples": None, "steps": None, "bytes": None}
    hit = {"reached": True, "seconds": 3.0, "wall_seconds": 4.0, "samples": 64, "steps": 2, "bytes": 8}
    rows: list[dict[str, Any]] = [
        {"label": "hit", "communication_seconds": 0.5, **hit},
        {"label": "ours", "communication_seconds": 0.5, **missed},
        {"label": "torch", "communication_seconds": None, **missed},
    ]
    study = write_record(tmp_path / "times.json", "time_to_accuracy", rows)
    recipes = write_record(
        tmp_path / "recipes.json",
        "recipes",
        [{"recipe": "r", "claim": claim, "held": 1, "smaller_values": [1.0, None]} for claim in "ab"],
    )
    assert main([str(study), str(recipes), "-o", str(tmp_path / "out")]) == 0
    first, ours, torch = markdown_rows(tmp_path / "out" / "tables" / "times-rows.md")
    assert (first["wall (s)"], first["bytes"]) == ("4.00", "8")
    assert [ours[key] for key in ("seconds", "wall (s)", "samples", "steps", "bytes")] == ["∞"] * 5
    assert (torch["seconds"], torch["bytes"], torch["communication (ms)"]) == ("∞", "–", "–")
    assert "smaller values 1.00, ∞" in (tmp_path / "out" / "tables" / "recipes-rows.md").read_text()
