"""When one rank fails, all end, and the cause is named once.

Under plain Python an exception on one rank leaves the others waiting for it. The hooks installed here print which rank
failed on which host, with the traceback, and abort the job. Several ranks often fail together, of one cause: rank 0
speaks at once, the others a moment later, and those that merely noticed a silent peer (CommunicationError) last; the
first to speak ends the job, so the rest stay silent.
"""

import sys
import threading
import time
import traceback
from types import TracebackType

from allreduce_sgd.errors import CommunicationError, ConfigError
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
        time.sleep(_delay_seconds(error, topology))
        # A second failing thread waits here for ever: the first one ends the process.
        reporting.acquire()
        where = topology.describe() + (f", thread {thread}" if thread else "")
        status = 1
        if isinstance(error, KeyboardInterrupt):
            _say(f"{where}: interrupted")
            status = INTERRUPTED
        elif isinstance(error, ConfigError):
            _say(f"{where}: {error}")
            status = 2
        else:
            _say(f"{where}: {type(error).__name__}: {error}")
            _say("".join(traceback.format_exception(type(error), error, trace)).rstrip())
        # Launchers drop what a rank wrote last if it aborts before they have read it.
        time.sleep(_FORWARDING_SECONDS)
        topology.abort(status)

    def in_main(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(error, trace, None)

    def in_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
            report(arguments.exc_value, arguments.exc_traceback, arguments.thread.name if arguments.thread else "?")

    sys.excepthook = in_main
    threading.excepthook = in_thread


def _delay_seconds(error: BaseException, topology: Topology) -> float:
    delay = _CONSEQUENCE_DELAY_SECONDS if isinstance(error, CommunicationError) else 0.0
    return delay + (_PEER_DELAY_SECONDS if topology.rank > 0 else 0.0)


def _say(text: str) -> None:
    # torch.distributed wraps the excepthook and collects sys.stderr while ours runs, which ends the process.
    print(text, file=sys.__stderr__ or sys.stderr, flush=True)
