from pathlib import Path

import pytest

from benchmarks.report.__main__ import main
from tests.benchmarks.synthetic_study import STEPS, write_record, write_synthetic_study


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the made-up study and of a record of step_time, with a name that HTML and Markdown would take."""
    folder = tmp_path_factory.mktemp("report")
    study = write_synthetic_study(folder / "study")
    record = write_record(folder / "step_time.json", "step_time", [*STEPS[:2], {**STEPS[2], "setting": "<i>|$x$"}])
    assert main([str(study), str(record), "-o", str(folder / "out"), "--title", "A & B"]) == 0
    return folder / "out"
