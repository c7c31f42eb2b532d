"""When one rank fails, all end, and the cause is named once.

Under plain Python an exception on one rank leaves the others waiting for it. The hooks installed here print which rank
failed on which host, with the traceback, and abort the job. Several ranks often fail together, of one cause: rank 0
speaks at once, the others a moment later, and those that merely noticed a silent peer (CommunicationError) last; the
first to speak ends the job, so the rest stay silent. That a file could not be written (OutputError) takes one line.
"""

import contextlib
import signal
import sys
import threading
import time
import traceback
from types import TracebackType

from allreduce_sgd.errors import CommunicationError, ConfigError, OutputError, write_line
from allreduce_sgd.topology import Topology

__all__ = ["INTERRUPTED", "install_excepthooks"]

INTERRUPTED = 130
# Each longer than the ones before, so that the first to speak has ended the job before the next would.
_FORWARDING_SECONDS = 0.3
_PEER_DELAY_SECONDS = 1.0
_CONSEQUENCE_DELAY_SECONDS = 2.5


def install_excepthooks(topology: Topology) -> None:
    """Make an uncaught exception, in the main thread or another, end all ranks within seconds. Each rank calls.

    One rank alone keeps Python's own hooks.
    """
    if topology.size == 1:
        # Nobody waits for a rank alone, and Python's own way of ending it runs what the program left to do at exit.
        return
    reporting = threading.Lock()

    def report(error: BaseException, trace: TracebackType | None, thread: str | None) -> None:
        with contextlib.suppress(ValueError):  # not the main thread
            # A second Ctrl-C would end this rank alone, before it has ended the others.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(_delay_seconds(error, topology))
        # A second failing thread waits here for ever: the first one ends the process.
        reporting.acquire()
        status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ConfigError) else 1
        try:
            _tell(topology.describe() + (f", thread {thread}" if thread else ""), error, trace)
            # Launchers drop what a rank wrote last if it aborts before they have read it.
            time.sleep(_FORWARDING_SECONDS)
        finally:
            # Also where there is no memory left to tell, or nobody to read it.
            topology.abort(status)

    def in_main(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(error, trace, None)

    def in_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
            report(arguments.exc_value, arguments.exc_traceback, arguments.thread.name if arguments.thread else "?")

    sys.excepthook = in_main
    threading.excepthook = in_thread


def _tell(where: str, error: BaseException, trace: TracebackType | None) -> None:
    match error:
        case KeyboardInterrupt():
            _say(f"{where}: interrupted")
        case ConfigError() | OutputError():
            _say(f"{where}: {error}")
        case _:
            _say(f"{where}: {type(error).__name__}: {error}")
            _say("".join(traceback.format_exception(type(error), error, trace)).rstrip())


def _delay_seconds(error: BaseException, topology: Topology) -> float:
    delay = _CONSEQUENCE_DELAY_SECONDS if isinstance(error, CommunicationError) else 0.0
    return delay + (_PEER_DELAY_SECONDS if topology.rank > 0 else 0.0)


def _say(text: str) -> None:
    # torch.distributed wraps the excepthook and collects sys.stderr while ours runs, which ends the process.
    write_line(text, sys.__stderr__ or sys.stderr)
