"""Whatever specifications of studies and files of results hold, a mistake in them is told in one line."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.report.compose import section_of
from benchmarks.report.sources import read_sources
from benchmarks.study.results import fields_of, read_study
from benchmarks.study.spec import read_spec, shipped
from tests.benchmarks.synthetic_study import CELLS, HEAD, STEPS, make_run
from tests.fuzz.damage import damaged, fuzz, refuses_in_one_line, unusual_text

SPEC = (Path(__file__).parents[2] / "benchmarks" / "study" / "specs" / "digits-quick.toml").read_bytes()
RUN = json.loads(json.dumps(fields_of(make_run(CELLS[4], 4, 0))))
RUN["evaluations"] = RUN["evaluations"][-2:]
STUDY = "".join(f"{json.dumps(line)}\n" for line in (HEAD, RUN, {**RUN, "seed": 1})).encode()
RECORD = {**HEAD, "benchmark": "step_time", "rows": STEPS}

junk: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), unusual_text()),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(unusual_text(), inner, max_size=2),
)


def changed(draw: st.DataObject, whole: Any) -> Any:
    """A copy of nested dictionaries and lists, in which something is missing or of another kind."""
    whole = copy.deepcopy(whole)
    inner = whole
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = draw.draw(st.sampled_from(keys))
        if isinstance(inner[key], dict | list) and inner[key] and draw.draw(st.booleans()):
            inner = inner[key]
            continue
        if draw.draw(st.booleans()):
            del inner[key]
        else:
            inner[key] = draw.draw(junk)
        return whole


@fuzz(80)
@given(st.one_of(damaged(SPEC, len(SPEC)), st.binary(max_size=100)))
@example(SPEC.replace(b"seeds = ", b"seeds = " + b"9" * 5000))
@example(b"a = " + b"[" * 5000)
@example(b'name = "a\\u0000b"')
@example(b'"a\\nb" = 1')
@example(b"name = " + b'"' + b"x" * 9000 + b'"')
@example(SPEC + b"\n[x]\n" + b"y" * 9000 + b" = 1\n")
def test_any_specification(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spec.toml"
    path.write_bytes(content)
    refuses_in_one_line(lambda: read_spec(str(path)))


@fuzz(30)
@given(unusual_text())
def test_any_name_of_a_specification(name: str) -> None:
    if name not in shipped():
        assert refuses_in_one_line(lambda: read_spec(name))


@fuzz(80)
@given(st.one_of(damaged(STUDY, len(STUDY)), st.binary(max_size=100), junk.map(json.dumps).map(str.encode)))
@example(b"[" * 100_000)
@example(b"[]\n")
@example(b"null\nnull\n")
@example(b"{}\n{}\n")
@example(b"9" * 5000)
def test_any_file_of_results(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    refuses_in_one_line(lambda: read_study(path))
    refuses_in_one_line(lambda: read_sources([path]))


@fuzz(80)
@given(st.data())
def test_any_entry_of_a_study(tmp_path: Path, data: st.DataObject) -> None:
    head, run = data.draw(st.sampled_from(((True, False), (False, True))))
    lines = [changed(data, HEAD) if head else HEAD, changed(data, RUN) if run else RUN, {**RUN, "seed": 1}]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    refuses_in_one_line(lambda: read_sources([path]))


@fuzz(6)
@given(st.data())
def test_any_row_of_a_record_is_reported_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(changed(data, RECORD)))
    (tmp_path / "figures").mkdir(exist_ok=True)
    refuses_in_one_line(lambda: [section_of(source, tmp_path / "figures") for source in read_sources([path])])


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_study_with_a_forged_number_is_reported_or_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "results.jsonl"
    lines = [HEAD, {**RUN, "train_seconds": value}, {**RUN, "seed": 1}]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "figures").mkdir()
    refuses_in_one_line(lambda: [section_of(source, tmp_path / "figures") for source in read_sources([path])])
