"""Functions that a user names on the command line as `module:function`, for data sets and for models alike.

The current folder is importable while the module is imported, as under `python -m`. Whatever goes wrong inside the
user's code is the user's to mend, so it is reported as a one-line `ConfigError` with the original exception as cause.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from allreduce_sgd.errors import ConfigError

__all__ = ["call_with_named", "describe", "load_function", "refusing"]

_LONGEST_TEXT = 300


def describe(error: BaseException) -> str:
    """The type and text of `error` in one line, shortened when it is very long."""
    # Bytes that are not UTF-8 come as what no file or terminal takes.
    text = " ".join(str(error).encode("utf-8", "backslashreplace").decode("utf-8").split())
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any exception of the body into a `ConfigError` that starts with `what`; a `ConfigError` passes unchanged.

    For foreign code and for decoders of files: both may raise nearly anything.
    """
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what}: {describe(error)}") from error


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def load_function(reference: str, flag: str) -> Callable[..., Any]:
    """Import the callable that `reference`, of the form `module:function`, names; `flag` is for the error texts.

    Raises:
        ConfigError: the form is wrong, the module is not found or fails to import, or it has no such callable.
    """
    module_name, _, function_name = reference.partition(":")
    if not (function_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ConfigError(f"{flag} {reference}: expected module:function, for example my_code:build")
    importlib.invalidate_caches()
    with refusing(f"{flag} {reference}: importing {module_name} raised"), _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # A missing import inside the user's module is another mistake than a missing module: only the latter
            # carries the name that was asked for, or one of its parents.
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"{flag} {reference}: no module {error.name} in the current folder {Path.cwd()}, and none installed"
            ) from error
    function = getattr(module, function_name, None)
    if function is None:
        raise ConfigError(f"{flag} {reference}: {module_name} has no function {function_name}")
    if not callable(function):
        raise ConfigError(f"{flag} {reference}: {function_name} is a {type(function).__name__}, expected a function")
    loaded: Callable[..., Any] = function
    return loaded


def call_with_named(function: Callable[..., Any], available: Mapping[str, Any], what: str) -> Any:
    """Call `function` with those entries of `available` that its signature names; `what` starts the error texts.

    Raises:
        ConfigError: the function requires an argument that is not available, or it raised.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        # Some callables written in C have no signature, so they name nothing.
        parameters = []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and not (p in named and p.name in available)
    ]
    if unknown:
        raise ConfigError(
            f"{what}: the function requires {', '.join(unknown)}; it may name only {', '.join(available)}"
        )
    with refusing(f"{what}: the function raised"):
        return function(**{p.name: available[p.name] for p in named if p.name in available})
