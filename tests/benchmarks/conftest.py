from pathlib import Path

import pytest

from benchmarks.report.__main__ import main
from tests.benchmarks.synthetic_study import (
    LAYERS,
    SCALING,
    STEPS,
    course_row,
    write_record,
    write_synthetic_study,
)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the made-up study and of records with figures, with a name that HTML and Markdown would take."""
    folder = tmp_path_factory.mktemp("report")
    study = write_synthetic_study(folder / "study")
    records = {
        "step_time": [*STEPS[:2], {**STEPS[2], "setting": "<i>|$x$"}],
        "course": [course_row("lr", series, points=40) for series in ("0.1", "0.2")],
        "layer_costs": LAYERS,
        "scaling": SCALING,
    }
    files = [write_record(folder / f"{name}.json", name, rows) for name, rows in records.items()]
    assert main([str(study), *map(str, files), "-o", str(folder / "out"), "--title", "A & B"]) == 0
    return folder / "out"
