"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-00000120`: `shared.pt` (model, optimizer, schedule, position, configuration; written by
rank 0), `rank-00000.pt` ... (what each rank has of its own: random states, buffers, the strategy's state), and
`manifest.json` with the size and SHA-256 of every file. It is written under a temporary name, flushed to disk and
renamed; the file `latest` names the newest. Ranks must see the same folder (one host, or a shared file system).

Files are read with `weights_only=True`: a checkpoint cannot run code.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.comm.objects import all_gather_object
from allreduce_sgd.durable import replace_file, sync_folder, write_file
from allreduce_sgd.errors import CheckpointError, ConfigError, OutputError, quoted

__all__ = ["Checkpoint", "find", "save", "save_model"]

_FORMAT = "allreduce_sgd checkpoint 1"
_SHARED = "shared.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest and file sizes and hashes have been verified."""

    folder: Path
    step: int
    world_size: int

    def shared(self) -> dict[str, Any]:
        return _load(self.folder / _SHARED)

    def of_rank(self, rank: int) -> dict[str, Any]:
        """Return what `rank` saved of its own; meaningful only for a job of `world_size` ranks."""
        return _load(self.folder / _rank_file(rank))


def save(
    run_folder: Path, step: int, shared: dict[str, Any], own: dict[str, Any], keep: int, comm: Communicator
) -> None:
    """Write the checkpoint of `step` and keep only the newest `keep`. All ranks must call.

    `shared` counts on rank 0 only. Values may be tensors, numbers, strings, and lists, tuples and dicts of them.
    Raises CheckpointError on all ranks where one could not write; older checkpoints stay as they are.
    """
    checkpoints = run_folder / "checkpoints"
    name = f"step-{step:08d}"
    temporary = checkpoints / f".{name}.tmp"
    files: dict[str, Any] = {}

    def prepare() -> None:
        if comm.rank == 0:
            checkpoints.mkdir(exist_ok=True)
            for left in checkpoints.glob(".step-*.tmp"):
                shutil.rmtree(left)
            temporary.mkdir()

    def write() -> None:
        files[_rank_file(comm.rank)] = _write(temporary / _rank_file(comm.rank), own)
        if comm.rank == 0:
            files[_SHARED] = _write(temporary / _SHARED, shared)

    def publish() -> None:
        if comm.rank != 0:
            return
        manifest = {"format": _FORMAT, "step": step, "world_size": comm.size, "files": everyones}
        write_file(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        target = checkpoints / name
        if target.exists():
            replaced = checkpoints / f".{name}.old.tmp"
            target.rename(replaced)
            temporary.rename(target)
            shutil.rmtree(replaced)
        else:
            temporary.rename(target)
        replace_file(checkpoints / "latest", name + "\n")
        folders = _folders(checkpoints)
        position = folders.index(target)
        # Later ones belong to a course that was given up by resuming from an earlier checkpoint.
        for unwanted in folders[: max(0, position + 1 - keep)] + folders[position + 1 :]:
            shutil.rmtree(unwanted, ignore_errors=True)

    try:
        _together(prepare, comm, checkpoints)
        _together(write, comm, checkpoints)
        everyones = {file: facts for part in all_gather_object(comm, files) for file, facts in part.items()}
        _together(publish, comm, checkpoints)
    except CheckpointError:
        if comm.rank == 0:
            # A full disk has better uses for it.
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_model(file: Path, model: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Write a model's state_dict as "model", with `facts` beside it, for torch.load(file, weights_only=True).

    One rank calls. Raises OutputError where it cannot be written; a file there before is then still whole.
    """
    memory = io.BytesIO()
    torch.save({"model": model, **facts}, memory)
    try:
        replace_file(file, memory.getbuffer())
    except OSError as problem:
        raise OutputError(f"cannot write {file}: {problem.strerror}") from problem


def find(path: Path) -> Checkpoint:
    """Return the newest checkpoint of a run's folder, or the one whose own folder is given.

    Raises ConfigError, naming the checkpoint and, where there is one, the newest intact one before it, if it is
    truncated, damaged, or not a checkpoint of this program.
    """
    if (path / "manifest.json").exists() or path.parent.name == "checkpoints":
        folder = path
    else:
        folders = _folders(path / "checkpoints")
        if not folders:
            raise ConfigError(f"--resume: {path} has no checkpoint")
        folder = folders[-1]
        named = path / "checkpoints" / "latest"
        if named.is_file():
            latest = path / "checkpoints" / named.read_text(errors="replace").strip()
            folder = latest if latest in folders else folder
    flaw, checkpoint = _verify(folder)
    if checkpoint is not None:
        return checkpoint
    earlier = [each for each in _folders(folder.parent) if each.name < folder.name and _verify(each)[1] is not None]
    offer = f"; the one before it is intact: --resume {earlier[-1]}" if earlier else "; no earlier one is intact"
    raise ConfigError(f"--resume: checkpoint {folder} {flaw}{offer}")


def _verify(folder: Path) -> tuple[str, Checkpoint | None]:
    """Return what is wrong with a checkpoint's folder, or the checkpoint."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest.get("format") != _FORMAT:
            return f"is of another format ({quoted(manifest.get('format'))}, not {_FORMAT!r})", None
        step, world_size = manifest["step"], manifest["world_size"]
        if any(type(number) is not int or number < 0 for number in (step, world_size)):
            return f"is damaged: step {quoted(step)} of {quoted(world_size)} ranks", None
        files = set(manifest["files"])
        # Counted first: a damaged manifest may announce any number of ranks.
        if len(files) != 1 + world_size or files != {_SHARED, *map(_rank_file, range(world_size))}:
            return "is incomplete: its manifest does not list a file per rank", None
        for name, facts in manifest["files"].items():
            file = folder / name
            if file.stat().st_size != facts["bytes"]:
                return f"is truncated: {name} has {file.stat().st_size} bytes of {quoted(facts['bytes'])}", None
            with file.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != facts["sha256"]:
                    return f"is damaged: {name} does not have the hash it was written with", None
        return "", Checkpoint(folder, step, world_size)
    except FileNotFoundError as problem:
        return f"is incomplete: {Path(problem.filename).name} is missing", None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        return f"is not a checkpoint of this program ({' '.join(str(problem).split())})", None


def _together(action: Callable[[], None], comm: Communicator, checkpoints: Path) -> None:
    """Run `action` on this rank, and raise CheckpointError on all ranks if it failed on any."""
    error = None
    try:
        action()
    except OSError as problem:
        error = f"rank {comm.rank} cannot write a checkpoint into {checkpoints}: {problem.strerror or problem}"
    errors = [each for each in all_gather_object(comm, error) if each is not None]
    if errors:
        raise CheckpointError(errors[0])


def _folders(checkpoints: Path) -> list[Path]:
    return sorted(path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdecimal())


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _write(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    memory = io.BytesIO()
    torch.save(value, memory)
    data = memory.getbuffer()
    write_file(path, data)
    return {"bytes": data.nbytes, "sha256": hashlib.sha256(data).hexdigest()}


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch.load raises whatever its readers do
        raise ConfigError(f"--resume: {path} cannot be read: {' '.join(str(problem).split())[:200]}") from problem
    if not isinstance(loaded, dict):
        raise ConfigError(f"--resume: {path} does not hold what a checkpoint holds")
    return loaded
