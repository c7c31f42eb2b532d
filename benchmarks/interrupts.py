"""Being ended early, for programs that leave something behind: ranks in sessions of their own, which Ctrl-C and a time
limit do not reach, or folders that are half made.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["ended_in_order"]


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Have the first SIGINT or SIGTERM raise SystemExit, with status 130 or 143, so that the block can clean up.

    Later ones are ignored while the block lasts. Outside the main thread no signal is taken.
    """
    # A shell has a job in the background ignore Ctrl-C, which is not meant for it.
    here = threading.current_thread() is threading.main_thread()
    taken = [
        number for number in (signal.SIGINT, signal.SIGTERM) if here and signal.getsignal(number) is not signal.SIG_IGN
    ]

    def end(number: int, _: FrameType | None) -> None:
        # `timeout` sends its signal twice; the second must not cut short what the first began.
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
