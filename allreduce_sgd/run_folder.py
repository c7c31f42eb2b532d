"""The folder of a run: config.toml, metrics.jsonl, summary.json, checkpoints/."""

import datetime
import itertools
import json
from pathlib import Path

from allreduce_sgd.config import Config, to_toml
from allreduce_sgd.durable import replace_file
from allreduce_sgd.errors import ConfigError

__all__ = ["claim", "resumed_folder"]


def claim(config: Config, size: int, step: int) -> Path:
    """Make the folder of a run of `size` ranks, or take up that of the run resumed at `step`; write config.toml.

    Called by one rank. Raises ConfigError where the folder holds something already or cannot be written.
    """
    output, resume = config.run.output, config.run.resume
    try:
        if output is None and resume is not None:
            folder = resumed_folder(resume)
            _truncate_metrics(folder / "metrics.jsonl", step)
            (folder / "summary.json").unlink(missing_ok=True)
        else:
            folder = _make_new(config, size) if output is None else Path(output)
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"--output: {folder} is a file; name a folder that is new or empty")
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(
                    f"--output: the folder {folder} is already used; name a new one, or go on in it with "
                    f"--resume {folder}"
                )
            folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "config.toml", to_toml(config))
    except OSError as problem:
        what = "--resume" if output is None and resume is not None else "--output"
        raise ConfigError(
            f"{what}: cannot write into {problem.filename or output or resume}: {problem.strerror}"
        ) from problem
    return folder


def resumed_folder(resume: str) -> Path:
    """Return the run's folder, given it or the folder of one of its checkpoints."""
    path = Path(resume)
    return path.absolute().parent.parent if path.absolute().parent.name == "checkpoints" else path


def _make_new(config: Config, size: int) -> Path:
    data, model = config.data.dataset.partition(":")[0], config.model.model.replace(":", ".")
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{now}-{data}-{model}-{config.strategy.strategy}-p{size}"
    for count in itertools.count(1):
        folder = Path("runs") / (name if count == 1 else f"{name}-{count}")
        try:
            # Another job may start in the same second.
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError("counting ended")


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last one cut short: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue
        kept.append(line + "\n")
    replace_file(path, "".join(kept))
