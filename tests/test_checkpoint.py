"""Checkpoints are whole or refused, by name, with the one before offered."""

import json
from pathlib import Path

import pytest
import torch

from allreduce_sgd.checkpoint import find, save
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.errors import CheckpointError, ConfigError


def write(run: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        save(run, step, {"weights": torch.full((100,), float(step))}, {"seed": step}, keep, SingleCommunicator())


def test_the_newest_is_found_and_read_back(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    found = find(tmp_path)
    assert (found.step, found.world_size) == (20, 1)
    torch.testing.assert_close(found.shared()["weights"], torch.full((100,), 20.0))
    assert found.of_rank(0) == {"seed": 20}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000020\n"
    assert find(tmp_path / "checkpoints" / "step-00000010").step == 10
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30, 40, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000030", "step-00000040"]


def test_a_course_given_up_by_resuming_earlier_is_dropped_at_the_next_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30)
    write(tmp_path, 15, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000010", "step-00000015"]
    assert find(tmp_path).step == 15


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 20)
    assert find(tmp_path).step == 20


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("truncate", "is truncated: shared.pt has 10 bytes of"),
        ("flip", "is damaged: shared.pt"),
        ("remove", "is incomplete: rank-00000.pt is missing"),
        ("foreign", "is of another format"),
        ("garbage", "is not a checkpoint of this program"),
        ("no manifest", "is incomplete: manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered(
    tmp_path: Path, damage: str, text: str
) -> None:
    write(tmp_path, 10, 20)
    folder = tmp_path / "checkpoints" / "step-00000020"
    shared = folder / "shared.pt"
    match damage:
        case "truncate":
            shared.write_bytes(shared.read_bytes()[:10])
        case "flip":
            data = bytearray(shared.read_bytes())
            data[len(data) // 2] ^= 1
            shared.write_bytes(data)
        case "remove":
            (folder / "rank-00000.pt").unlink()
        case "foreign":
            (folder / "manifest.json").write_text(json.dumps({"format": "another program 7"}))
        case "garbage":
            (folder / "manifest.json").write_text("[1, 2")
        case "no manifest":
            (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=text) as caught:
        find(tmp_path)
    assert str(folder) in str(caught.value)
    assert f"the one before it is intact: --resume {tmp_path / 'checkpoints' / 'step-00000010'}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert find(tmp_path / "checkpoints" / "step-00000010").step == 10


def test_without_any_intact_checkpoint_none_is_offered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint"):
        find(tmp_path)
    write(tmp_path, 10)
    (tmp_path / "checkpoints" / "step-00000010" / "shared.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="no earlier one is intact"):
        find(tmp_path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("code ran",)

    save(tmp_path, 1, {"trap": Trap()}, {}, 3, SingleCommunicator())
    with pytest.raises(ConfigError, match="cannot be read"):
        find(tmp_path).shared()


def test_a_folder_that_cannot_be_written_leaves_older_checkpoints_intact(tmp_path: Path) -> None:
    write(tmp_path, 10)
    # A file in the place of the temporary folder: fails for root too, as missing permissions would not.
    (tmp_path / "checkpoints" / ".step-00000020.tmp").write_text("in the way")
    with pytest.raises(CheckpointError, match="rank 0 cannot write a checkpoint"):
        write(tmp_path, 20)
    assert find(tmp_path).step == 10
