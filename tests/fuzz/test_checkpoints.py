"""Whatever a run's folder holds, resuming it goes on or tells one mistake, and no file in it runs code.

Damage is found by the hashes in the manifest. They are no signature: what is forged together with them must not end in
a traceback either.
"""

import hashlib
import io
import json
import math
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from allreduce_sgd.checkpoint import find
from allreduce_sgd.train import main
from tests.fuzz.damage import bounded_memory, damaged, fuzz, refuses_in_one_line, unusual_text

FORGED_OPTIONS: tuple[dict[Any, Any], ...] = ({"lr": "fast"}, {"lr": math.nan}, {"a\nb": 1}, {7: 1}, {"seed": 2**70})
TRAINING = ["--model", "linear", "--optimizer", "adam", "--lr", "0.01", "--steps"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert main([*TRAINING, "3", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of it, for `restore` to make whole again."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def restore(copy: Path, run: Path) -> Path:
    """Make `copy` equal to `run` again, and return the folder of its checkpoint."""
    shutil.rmtree(copy)
    shutil.copytree(run, copy)
    return copy / "checkpoints" / "step-00000003"


def forge(folder: Path, name: str, content: bytes) -> None:
    """Write a file of the checkpoint, with the size and hash that its manifest has to have."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def saved(value: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def resume(copy: Path, capfd: pytest.CaptureFixture[str]) -> int:
    """Go on for two steps; a mistake must be told in one line."""
    capfd.readouterr()
    status = main(["--resume", str(copy), "--steps", "5"])
    errors = capfd.readouterr().err
    assert status in (0, 2)
    if status == 2:
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("allreduce-sgd: error: "), errors
        assert len(errors) < 2000
    return status


@fuzz(60)
@given(st.sampled_from(("manifest.json", "shared.pt", "rank-00000.pt", "../latest")), st.data())
def test_damaged_files(run: Path, copy: Path, name: str, data: st.DataObject) -> None:
    folder = restore(copy, run)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(st.one_of(damaged(content, 300), st.binary(max_size=40))))

    def read() -> None:
        checkpoint = find(copy)
        checkpoint.shared()
        checkpoint.of_rank(0)

    refuses_in_one_line(read)


@fuzz(60)
@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.floats(), unusual_text()),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(("format", "step", "world_size", "files", "bytes", "shared.pt")), inner)
        ),
    )
)
@example({"world_size": 10**15})
@example({"world_size": math.inf, "step": math.nan})
@example({"files": {"a\nb": {}}, "world_size": 0})
@example({"files": {"../../../config.toml": {}}, "world_size": 0})
@example({"format": "a\nb" * 2000})
def test_forged_manifests(run: Path, copy: Path, value: Any) -> None:
    manifest = restore(copy, run) / "manifest.json"
    whole = json.loads(manifest.read_text())
    for forged in (value, {**whole, **value} if isinstance(value, dict) else {**whole, "files": value}):
        manifest.write_text(json.dumps(forged))
        with bounded_memory(64 << 20):
            refuses_in_one_line(lambda: find(copy))


def test_a_manifest_nested_deeply(run: Path, copy: Path) -> None:
    (restore(copy, run) / "manifest.json").write_text("[" * 100_000)
    assert refuses_in_one_line(lambda: find(copy))


@fuzz(100)
@given(st.sampled_from(("shared.pt", "rank-00000.pt")), st.data())
def test_damaged_contents_with_right_hashes(run: Path, copy: Path, name: str, data: st.DataObject) -> None:
    folder = restore(copy, run)
    content = (folder / name).read_bytes()
    forge(folder, name, data.draw(st.one_of(damaged(content, len(content)), damaged(content, 1000))))
    with bounded_memory(256 << 20):
        refuses_in_one_line(lambda: (find(copy).shared(), find(copy).of_rank(0)))


def test_forged_entries(run: Path, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each entry left out, and each of another type; a model of another shape."""
    outcomes = []
    for name in ("shared.pt", "rank-00000.pt"):
        whole = torch.load(run / "checkpoints" / "step-00000003" / name, weights_only=True)
        for key in whole:
            forgeries = [{other: value for other, value in whole.items() if other != key}, {**whole, key: "text"}]
            if key == "model":
                forgeries.append({**whole, key: {each: value[:, None] for each, value in whole[key].items()}})
            if key == "configuration":
                forgeries += [{**whole, key: {**whole[key], **more}} for more in FORGED_OPTIONS]
            for forged in forgeries:
                forge(restore(copy, run), name, saved(forged))
                outcomes.append(resume(copy, capfd))
    assert outcomes.count(2) > len(outcomes) // 2


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all that is neither dict nor list within `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return [path] if inner is None else [one for key, each in inner for one in leaves(each, (*path, key))]


def test_forged_states_of_optimizer_and_schedule(run: Path, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each value of them in turn is of another type or shape, or one that no step leads to."""
    whole = torch.load(run / "checkpoints" / "step-00000003" / "shared.pt", weights_only=True)
    places = [(part, *path) for part in ("optimizer", "schedule") for path in leaves(whole[part])]
    values: tuple[Any, ...] = ("text", math.nan, -1.0, torch.zeros(7, 7), None, [1])
    outcomes = []
    # Not all pairs: each resumed run takes a tenth of a second.
    for number, path in enumerate(places):
        forged = deepcopy(whole)
        place = forged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = values[number % len(values)]
        forge(restore(copy, run), "shared.pt", saved(forged))
        outcomes.append(resume(copy, capfd))
    assert outcomes.count(2) > len(outcomes) * 3 // 4


class Trap:
    """Has its pickle call something."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code ran",)


@pytest.mark.parametrize("name", ["shared.pt", "rank-00000.pt"])
def test_no_code_runs(run: Path, copy: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    folder = restore(copy, run)
    whole = torch.load(folder / name, weights_only=True)
    forge(folder, name, saved({**whole, "trap": Trap()}))
    assert resume(copy, capfd) == 2
    assert "code ran" not in capfd.readouterr().out


def test_a_function_that_a_checkpoint_names_and_that_fails_is_one_line(
    run: Path, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run's own functions are its user's code, which is imported again; what it raises is told like any mistake."""
    folder = restore(copy, run)
    whole = torch.load(folder / "shared.pt", weights_only=True)
    whole["configuration"]["model"] = "tests.parts:raising_model"
    forge(folder, "shared.pt", saved(whole))
    assert resume(copy, capfd) == 2
