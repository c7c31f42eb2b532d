"""The exceptions of the package, so that callers can tell a user's mistake from a failure of the network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = [
    "CheckpointError",
    "CommunicationError",
    "CommunicationTimeout",
    "ConfigError",
    "MemoryNotSharedError",
    "MismatchError",
    "NonFiniteError",
    "OutputError",
    "counted",
    "located",
    "quoted",
    "write_line",
]

_LONGEST_QUOTED = 200


class ConfigError(Exception):
    """Bad input: a flag, a file or an environment. The text is one line that names it, the value and what is allowed.

    The command line turns it into that one line on standard error and exit status 2, without a traceback. `rank` is
    the rank that prints it, where ranks have agreed on one, else None.
    """

    rank: int | None = None


class CommunicationError(RuntimeError):
    """Ranks could not exchange data: a peer is gone, a transfer failed, or the communicator is closed."""


class CommunicationTimeout(CommunicationError):
    """A wait passed its deadline; the text names the operation, the rank and the seconds waited."""


class MemoryNotSharedError(CommunicationError):
    """The ranks of a node cannot share memory, or not as much; the text says why."""


class MismatchError(CommunicationError):
    """Ranks disagree about something that must be equal on all of them; the text names it and the ranks."""


class NonFiniteError(RuntimeError):
    """A gradient holds NaN or Inf; the text names the parameters and the ranks. Raised on all ranks together."""


class OutputError(RuntimeError):
    """A file of a run could not be written: a full disk, a read-only folder. The text names the file and the reason."""


class CheckpointError(OutputError):
    """A checkpoint could not be written on some rank; the text names the rank, the folder and the reason."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return "1 rank", "3 ranks": for texts that name a number of things. `many` None: `one` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def quoted(value: object) -> str:
    """Return `value` as Python writes it, shortened if it is long: for texts of one line about what others wrote."""
    try:
        text = repr(value)
    except ValueError:
        # Python does not write out integers of thousands of digits.
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= _LONGEST_QUOTED else f"{text[:_LONGEST_QUOTED]}..."


def write_line(text: str, file: TextIO) -> None:
    """Write `text` and the end of its line as one piece, and flush.

    With PYTHONUNBUFFERED `print` writes them one after the other, and launchers put another rank's line in between.
    """
    file.write(f"{text}\n")
    file.flush()


@contextmanager
def located(where: str) -> Iterator[None]:
    """Have the text of a CommunicationError or NonFiniteError that is raised within begin with `where`: "step 7"."""
    try:
        yield
    except (CommunicationError, NonFiniteError) as problem:
        problem.args = (f"{where}: {problem}",)
        raise
