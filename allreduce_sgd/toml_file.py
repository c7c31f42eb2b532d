"""Reading TOML files that may hold anything."""

import tomllib
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError

__all__ = ["load_toml"]


def load_toml(path: Path, what: str) -> dict[str, Any]:
    """Return what the file holds. Raises ConfigError, beginning with `what`, where it cannot be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"{what}: cannot read {path}: {problem.strerror}") from problem
    except RecursionError as problem:
        raise ConfigError(f"{what}: {path} is not valid TOML: nested too deeply") from problem
    except ValueError as problem:
        # Besides what is no TOML: text that is not UTF-8, and integers of thousands of digits.
        raise ConfigError(f"{what}: {path} is not valid TOML: {' '.join(str(problem).split())}") from problem
