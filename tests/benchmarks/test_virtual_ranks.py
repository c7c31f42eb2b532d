"""Steps with virtual ranks against plain ones: the table, and a run on two ranks."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.virtual_ranks import main, table
from tests.launching import mpirun


def test_the_record_of_two_ranks(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    flags = ["--workloads", "mlp512-b16", "--multiples", "1,3", "--steps", "2", "--rounds", "2", "--json", str(record)]
    done = mpirun(2, ["-m", "benchmarks.virtual_ranks", *flags])
    assert done.status == 0, done.errors
    rows = json.loads(record.read_text())["rows"]
    assert [(row["contender"], row["virtual_ranks"]) for row in rows] == [
        ("sync", None),
        ("sync_unsharded", None),
        ("virtual", 2),
        ("virtual", 6),
    ]
    assert not any(row["wrong"] for row in rows)
    for row in rows:
        assert (row["rounds"], row["steps"]) == (2, 2)
        assert 0 < row["minimum_seconds"] < row["median_seconds"] < row["maximum_seconds"]
    assert rows[0]["minimum_ratio"] == rows[0]["ratio"] == rows[0]["maximum_ratio"] == 1
    assert rows[3]["minimum_ratio"] < rows[3]["ratio"] < rows[3]["maximum_ratio"]
    plain, virtual, six = rows[1]["sent_bytes"], rows[2]["sent_bytes"], rows[3]["sent_bytes"]
    assert virtual == pytest.approx(plain, rel=0.01)
    # 3 leaves of 6 are two nodes of the tree, and both are sent.
    assert six == pytest.approx(1.5 * plain, rel=0.01)
    line = table(rows).splitlines()[-1]
    assert line.split()[1:4] == ["6", "virtual", "ranks"]
    # The median and the range of the time, and those of the ratio.
    assert re.search(r" \S+ \[\S+–\S+\] +\S+ \[\S+–\S+\] ", line)


def test_bad_arguments_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workloads", "gpt"]) == 2
    assert "--workloads: unknown value 'gpt'" in capsys.readouterr().err
    assert main(["--workloads", "mlp512-b16", "--multiples", "1,17"]) == 2
    assert "--multiples 17: choose at most 16, the samples of a rank" in capsys.readouterr().err
