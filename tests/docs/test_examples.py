"""The code of the pages runs as it stands there, and prints what they say."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from tests import warm_start
from tests.launching import ROOT
from tests.snippets import Snippet, snippets, training_commands

DOCS = ROOT / "docs"
CODES = [(page.stem, each) for page in sorted(DOCS.glob("*.md")) for each in snippets(page, "python")]
DISTRIBUTED = [each for _, each in CODES if "connect()" in each.code]
ALONE = [(page, each) for page, each in CODES if "connect()" not in each.code and each.file is None and page != "run"]


@pytest.mark.parametrize("snippet", DISTRIBUTED, ids=["loop", "sharded", "collective"])
def test_code_for_several_ranks(tmp_path: Path, snippet: Snippet) -> None:
    # A file per rank: what ranks print at once comes mixed through the launcher.
    result = "[loss.item(), [p.tolist() for p in model.parameters()]]" if "model" in snippet.code else "[0, average]"
    ending = f"import json; json.dump({result}, open(f'result-{{comm.rank}}', 'w'))\n"
    done = warm_start.mpirun(2, ["-c", snippet.code + ending], cwd=tmp_path)
    assert (done.status, done.errors) == (0, "")
    losses, values = zip(*(json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(2)), strict=True)
    assert max(losses) < 0.5
    assert values[0] == values[1]


@pytest.mark.parametrize(("page", "snippet"), ALONE, ids=[page for page, _ in ALONE])
def test_code_for_one_process_prints_what_the_page_says(page: str, snippet: Snippet) -> None:
    assert snippet.prints is not None
    assert _run(snippet.code) == snippet.prints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the pages, in which the commands of tutorial and quick start have run."""
    here = tmp_path_factory.mktemp("pages")
    for _, each in CODES:
        if each.file is not None:
            (here / each.file).write_text(each.code)
    with contextlib.chdir(here):
        _run((here / "make_data.py").read_text())
    commands = [
        next(each for each in training_commands(DOCS / "index.md") if "npz:mine.npz" in each),
        *training_commands(DOCS / "tutorial.md"),
        *training_commands(DOCS / "run.md"),
    ]
    assert len(commands) >= 4
    flags = [[*each, *([] if "--output" in each else ["--output", f"run-{i}"])] for i, each in enumerate(commands)]
    done = warm_start.mpirun(2, ["-m", "tests.several_trainings", json.dumps(flags)], cwd=here)
    assert done.status == 0, done.errors
    return here


def test_the_tutorials_model_learns_the_spirals(folder: Path) -> None:
    summary = json.loads((folder / "run-1" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.9


def test_the_curve_of_a_run_is_drawn(folder: Path) -> None:
    matplotlib.use("agg")
    code = next(each.code for page, each in CODES if page == "run")
    with contextlib.chdir(folder):
        _run(code)
    assert (folder / "accuracy.png").stat().st_size > 1000


def test_a_trace_of_one_step_is_written(folder: Path) -> None:
    assert json.loads((folder / "step.json").read_text())["traceEvents"]


def test_every_figure_of_a_run_is_explained(folder: Path) -> None:
    text = (DOCS / "run.md").read_text(encoding="utf-8")
    metrics, summary = (text.partition("## summary.json")[part] for part in (0, 2))
    for name in json.loads((folder / "run-0" / "summary.json").read_text()):
        assert f"`{name}`" in summary, name
    for line in (folder / "run-0" / "metrics.jsonl").read_text().splitlines():
        for name in json.loads(line):
            assert f"`{name}`" in metrics, name


def test_what_is_said_of_figures_is_in_the_sources() -> None:
    """No field is explained that no code writes."""
    tables = re.findall(r"^\| (`[^|]+) \|", (DOCS / "run.md").read_text(encoding="utf-8"), re.MULTILINE)
    names = re.findall(r"`([a-z_0-9]+)`", " ".join(tables))
    assert len(names) > 40
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "allreduce_sgd").rglob("*.py"))
    for name in names:
        assert f'"{name}"' in sources or f"{name}: " in sources, name


def _run(code: str) -> str:
    """Return what the code prints."""
    out = io.StringIO()
    scope: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(out):
        exec(compile(code, "page", "exec"), scope)
    return out.getvalue()
