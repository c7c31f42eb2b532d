"""Steps of local SGD against steps without communication: the table, and a run on two ranks."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.local_steps import main, table
from tests.warm_start import mpirun


def test_the_record_of_two_ranks(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    flags = ["--periods", "2,4", "--steps", "8", "--rounds", "2", "--json", str(record)]
    done = mpirun(2, ["-m", "benchmarks.local_steps", *flags])
    assert done.status == 0, done.errors
    never, two, four = json.loads(record.read_text())["rows"]
    assert (never["period"], two["period"], four["period"]) == (None, 2, 4)
    assert never["minimum_ratio"] == never["ratio"] == never["maximum_ratio"] == 1
    for row in (never, two, four):
        assert (row["rounds"], row["steps"]) == (2, 8)
        assert 0 < row["minimum_seconds"] < row["median_seconds"] < row["maximum_seconds"]
    assert two["minimum_ratio"] < two["ratio"] < two["maximum_ratio"]
    assert never["sent_bytes"] < 100
    # 8 steps have 4 exchanges or 2; each comes after a barrier, which costs some bytes.
    assert two["sent_bytes"] == pytest.approx(2 * four["sent_bytes"], rel=0.01)
    lines = table([never, two, four]).splitlines()
    assert lines[2].split()[1] == "never"
    # The median and the range of the time, and those of the ratio.
    assert re.search(r" \S+ \[\S+–\S+\] +\S+ \[\S+–\S+\] ", lines[3])


def test_bad_arguments_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workloads", "gpt"]) == 2
    assert "--workloads: unknown value 'gpt'" in capsys.readouterr().err
    assert main(["--periods", "4,8", "--delay", "4"]) == 2
    assert "--delay 4: choose 0 to 3, less than every period" in capsys.readouterr().err
