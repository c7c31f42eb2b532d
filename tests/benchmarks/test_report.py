"""What a report says of a study that is made up, so that every number is known; and what it refuses."""

import base64
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.report.__main__ import main
from benchmarks.study.results import Study, read_study
from tests.benchmarks.report_files import Page, markdown_rows
from tests.benchmarks.synthetic_study import (
    CELLS,
    HEAD,
    make_run,
    study_runs,
    write_record,
    write_synthetic_study,
)


@pytest.fixture
def study(report: Path) -> Study:
    return read_study(report.parent / "study" / "results.jsonl")


def test_the_page_needs_nothing_else(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = Page(text)
    assert not page.all("script")
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(str(link["href"]) == "data:," for link in page.all("link"))
    assert all(str(link["href"]).startswith("#") for link in page.all("a"))
    assert not re.search(r"https?://|@import|url\(", text)


def test_every_image_is_a_figure_of_the_folder_and_told_in_words(report: Path) -> None:
    images = Page((report / "index.html").read_text()).all("img")
    files = {file.read_bytes() for file in (report / "figures").iterdir()}
    assert {base64.b64decode(str(image["src"]).partition(",")[2]) for image in images} == files
    assert len(images) == len(files) == 16
    assert all(len(str(image["alt"])) > 30 for image in images)


def test_links_lead_somewhere_and_headings_are_in_order(report: Path) -> None:
    page = Page((report / "index.html").read_text())
    places = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(places) == len(set(places))
    assert {str(link["href"])[1:] for link in page.all("a")} <= set(places)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def test_text_is_escaped(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert "<i>" not in text
    assert "&lt;i&gt;|$x$" in text
    assert "<h1>A &amp; B</h1>" in text
    table = (report / "tables" / "step-time-rows.md").read_text()
    assert "&lt;i&gt;\\|$x$" in table
    assert "<i>" not in table


def test_tables_have_the_numbers_of_the_runs(report: Path, study: Study) -> None:
    runs = {
        each.label: sorted(run.seconds for run in study.runs if run.cell == each and run.phase == "measured")
        for each in CELLS
    }
    rows = {row["method"]: row for row in markdown_rows(report / "tables" / "made-up-cells.md")}
    sync, local = runs["sync, 2 ranks, batch 64"], runs["local, period 8, 2 ranks, batch 32"]
    assert rows["sync, 2 ranks, batch 64"]["train s"] == f"{sync[2]:.1f} \\[{sync[0]:.1f}–{sync[4]:.1f}\\]"
    assert rows["local, period 8, 2 ranks, batch 32"]["train s"] == f"{local[2]:.1f} \\[{local[0]:.1f}–∞\\]"
    assert rows["local, period 8, 2 ranks, batch 32"]["reached"] == "4/5"
    assert rows["torch DDP over Gloo, 2 ranks, batch 64"]["MB sent per rank"] == "–"

    best = runs["serial, batch 64"][2]
    assert best == min(runs[f"serial, batch {batch}"][2] for batch in (1, 16, 64))
    rows = {row["method"]: row for row in markdown_rows(report / "tables" / "made-up-speed-up.md")}
    assert rows["sync, 2 ranks, batch 64"]["3: accuracy ÷ best \\[min–max\\]"] == (
        f"{best / sync[2]:.2f} \\[{best / sync[4]:.2f}–{best / sync[0]:.2f}\\]"
    )
    assert rows["local, period 8, 2 ranks, batch 32"]["3: accuracy ÷ best \\[min–max\\]"].endswith(
        f"\\[0–{best / local[0]:.2f}\\]"
    )


def test_every_run_is_named_with_its_folder(report: Path, study: Study) -> None:
    rows = markdown_rows(report / "tables" / "made-up-runs.md")
    assert sorted(row["folder"] for row in rows) == sorted(run.folder for run in study.runs)
    cells = markdown_rows(report / "tables" / "made-up-cells.md")
    for cell in cells:
        first, last = map(int, cell["runs"].split("–"))
        theirs = rows[first - 1 : last]
        assert {(row["method"], row["phase"]) for row in theirs} == {(cell["method"], "measured")}
        assert [row["seed"] for row in theirs] == ["0", "1", "2", "3", "4"]
    missed = [row for row in rows if row["reached"] == "no" and row["phase"] == "measured"]
    assert [(row["train s"], row["samples"], row["seed"]) for row in missed] == [("∞", "∞", "3")]
    page = Page((report / "index.html").read_text())
    assert {attributes.get("id") for attributes in page.all("tr")} >= {f"made-up-runs-{n}" for n in range(1, 121)}


def test_what_was_run_is_told(report: Path) -> None:
    for text in ("".join(Page((report / "index.html").read_text()).text), (report / "report.md").read_text()):
        for fact in (HEAD["commit"], "Made-up CPU, 2 cores, 8 GiB", "10 runs for each method, of 5 learning rates"):
            assert fact in text
        assert "0, 1, 2, 3, 4; 1000, 1001 for tuning" in text


def test_the_commits_of_runs_are_told_where_they_differ(tmp_path: Path) -> None:
    runs = [make_run(CELLS[4], 4, seed) for seed in range(3)]
    made = [replace(run, commit=commit) for run, commit in zip(runs, ("older", "older", HEAD["commit"]), strict=True)]
    for name, some in (("both", made), ("one", made[2:]), ("unknown", runs), ("some", [*runs[:2], made[2]])):
        study = write_synthetic_study(tmp_path / name, some)
        assert main([str(study), "-o", str(tmp_path / f"{name}-out")]) == 0
        text = (tmp_path / f"{name}-out" / "report.md").read_text()
        assert (f"older (2 runs), {HEAD['commit']} (1 run)" in text) == (name == "both")
        assert (f"not noted (2 runs), {HEAD['commit']} (1 run)" in text) == (name == "some")


def test_a_study_that_has_only_begun_and_one_that_only_missed(tmp_path: Path) -> None:
    begun = write_synthetic_study(tmp_path / "a", [run for run in study_runs(CELLS[:1]) if run.phase == "tuning"])
    missed = write_synthetic_study(tmp_path / "b", [make_run(CELLS[4], 0, 0, reaches=False)])
    assert main([str(begun), str(missed / "results.jsonl"), "-o", str(tmp_path / "out")]) == 0
    assert markdown_rows(tmp_path / "out" / "tables" / "made-up-2-cells.md")[0]["train s"] == "∞"


def test_a_study_that_never_comes_near_its_target_is_drawn(tmp_path: Path) -> None:
    missed = make_run(CELLS[4], 4, 0, reaches=False)
    poor = replace(missed, evaluations=tuple(replace(each, test_accuracy=0.3) for each in missed.evaluations))
    study = write_synthetic_study(tmp_path / "study", [poor, replace(poor, seed=1)])
    assert main([str(study), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "figures" / "made-up-accuracy-bytes.png").exists()


def test_a_figure_of_some_of_the_methods_says_which(tmp_path: Path) -> None:
    cells = [
        replace(CELLS[4], label=f"sync {flag}, batch {batch}", global_batch_size=batch, flags=(("period", flag),))
        for flag in range(5)
        for batch in (32, 64)
    ]
    study = write_synthetic_study(tmp_path / "study", [make_run(cell, 4, 0) for cell in cells])
    assert main([str(study), "-o", str(tmp_path / "out")]) == 0
    told = "5 of 10 are drawn: the soonest batch of each method, and of these at most the 8 soonest."
    assert told in (tmp_path / "out" / "report.md").read_text()


def test_without_a_baseline_there_is_no_speed_up(tmp_path: Path) -> None:
    study = write_synthetic_study(tmp_path / "study", [make_run(CELLS[4], 4, 0)])
    assert main([str(study), "-o", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").rglob("*speed-up*"))


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = str(write_record(tmp_path / "new.json", "unheard_of", [{"a": 1}]))
    out = tmp_path / "out"
    out.mkdir()
    assert main([record, "-o", str(out)]) == 0
    (out / "figures" / "old.png").write_bytes(b"")
    assert main([record, "-o", str(out)]) == 0
    assert not (out / "figures" / "old.png").exists()
    capsys.readouterr()
    for foreign in ("notes.txt", "figures/notes.txt"):
        (out / foreign).write_text("mine")
        before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
        assert main([record, "-o", str(out)]) == 2
        assert f"holds {foreign}" in capsys.readouterr().err
        assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}
        (out / foreign).unlink()
    (out / "index.html").write_text("<p>a page of mine")
    assert main([record, "-o", str(out)]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "out"]


def bad_files(folder: Path) -> Iterator[tuple[list[str], str]]:
    good = str(write_record(folder / "good.json", "unheard_of", [{"a": 1}]))
    for name, text in {
        "empty": "",
        "text.json": "hello",
        "nameless.json": '{"rows": []}',
        "rows.json": '{"benchmark": "x", "rows": [1]}',
        "step.json": json.dumps({"benchmark": "step_time", "rows": [{"workload": "mlp"}]}),
        "load.json": json.dumps({"benchmark": "x", "rows": [{"a": 1}], "machine": {"load_average": ["x"]}}),
        "surrogate.json": '{"benchmark": "x", "rows": [{"a": "\\ud800"}]}',
        "half.jsonl": json.dumps(HEAD) + '\n{"label": "a"',
    }.items():
        (folder / name).write_text(text)
        yield [str(folder / name), "-o", str(folder / "out")], name
    yield [str(folder / "no such"), "-o", str(folder / "out")], "no such"
    yield [str(folder), "-o", str(folder / "out")], "results.jsonl"
    yield [good, good, "-o", str(folder / "out")], "given twice"
    yield [good, "-o", str(folder / "no" / "out")], "-o"
    yield [good, "-o", good], "-o"
    yield [good], "-o"
    yield ["-o", str(folder / "out")], "RESULTS"


def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, named in bad_files(tmp_path):
        assert main(arguments) == 2, named
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("report: error: ")
        assert named in captured.err
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = str(write_record(tmp_path / "new.json", "unheard_of", [{"a": 1}]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else name)
    assert main([record, "-o", str(tmp_path / "out")]) == 2
    assert "needs jinja2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
