"""Reading what is reported on: studies (their folder, or its results.jsonl) and records of benchmarks (JSON)."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError, counted
from benchmarks.study.results import Study, read_study
from benchmarks.table import format_number

__all__ = ["Record", "Source", "facts_of", "read_sources"]

_RESULTS = "results.jsonl"
_GIBIBYTE = 2**30


@dataclass(frozen=True)
class Record:
    """What a benchmark wrote with --json: `head` is all of it but the rows."""

    head: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    @property
    def benchmark(self) -> str:
        return str(self.head["benchmark"])


@dataclass(frozen=True)
class Source:
    """One of the files; `name` is unique among them, and may stand in a file's name and in an address."""

    path: Path
    name: str
    content: Study | Record


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Read all files. Raises ConfigError, which names the file, for one that is neither a study nor a record."""
    sources: list[Source] = []
    for path in paths:
        file = path / _RESULTS if path.is_dir() else path
        content = _read(file)
        stem = content.name if isinstance(content, Study) else file.stem
        name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "results"
        if any(source.path.resolve() == file.resolve() for source in sources):
            raise ConfigError(f"{file}: given twice")
        taken = {source.name for source in sources}
        unique = next(each for each in (name, *(f"{name}-{n}" for n in range(2, len(paths) + 2))) if each not in taken)
        sources.append(Source(file, unique, content))
    return sources


def _read(file: Path) -> Study | Record:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else "not text"
        raise ConfigError(f"{file}: {reason}") from problem
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict) and "rows" in whole:
        _check_text(file, whole)
        return _record(file, whole)
    study = read_study(file)
    _check_text(file, [study.head, *((run.cell.label, run.folder) for run in study.runs)])
    if not isinstance(study.head, dict) or any(not run.evaluations for run in study.runs):
        raise ConfigError(f"{file}: not the results of a study: a run without evaluations")
    return study


def _check_text(file: Path, content: object) -> None:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        raise ConfigError(f"{file}: holds half of a surrogate pair, which is no text") from problem


def _record(file: Path, whole: Mapping[str, Any]) -> Record:
    rows = whole["rows"]
    if not isinstance(whole.get("benchmark"), str):
        raise ConfigError(f"{file}: not the record of a benchmark: it does not name one")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row for row in rows):
        raise ConfigError(f"{file}: not the record of a benchmark: rows must be a list of objects")
    return Record({key: value for key, value in whole.items() if key != "rows"}, tuple(rows))


def facts_of(source: Source) -> list[tuple[str, str]]:
    """Return what was run, where and by what, as names and values; what the file does not tell is left out."""
    head = source.content.head
    machine = _mapping(head.get("machine"))
    versions = _mapping(head.get("versions"))
    cores, memory_bytes = machine.get("cores"), machine.get("memory_bytes")
    parts = [
        str(machine["processor"]) if "processor" in machine else None,
        f"{cores} {'core' if cores == 1 else 'cores'}" if isinstance(cores, int) else None,
        f"{memory_bytes / _GIBIBYTE:.0f} GiB of memory" if isinstance(memory_bytes, int) else None,
        str(machine["system"]) if "system" in machine else None,
    ]
    load = machine.get("load_average")
    if isinstance(load, list):
        parts.append(f"load average {', '.join(map(format_number, load))} over 1, 5 and 15 minutes")
    facts = [
        ("results", str(source.path)),
        ("benchmark", head.get("benchmark")),
        ("command", head.get("command")),
        ("commit", head.get("commit")),
        ("commits of the runs", _commits(source.content)),
        ("machine", ", ".join(part for part in parts if part)),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value is not None)),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _commits(content: Study | Record) -> str | None:
    """Name the commits that made a study's runs, where it went on with another than it began with."""
    if not isinstance(content, Study):
        return None
    found = Counter(run.commit for run in content.runs)
    # Older files tell of no run which commit made it.
    if set(found) <= {None} or set(found) <= {content.head.get("commit")}:
        return None
    return ", ".join(f"{commit or 'not noted'} ({counted(runs, 'run')})" for commit, runs in found.items())


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
