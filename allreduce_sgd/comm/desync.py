"""Desynchronised ranks are named rather than waited for: ranks that stand still tell each other what they wait in.

In a healthy run nothing is sent: operations that do not belong together never take each other's data, since their
messages and notes carry different stamps (`ledger.py`). So where ranks launch different things, they come to a
standstill. A rank on which a collective has not moved for a while asks all others what they have launched; they answer
from whatever thread looks after their communication, also while their main thread computes. What has been launched
does not change, so two answers that contradict each other are proof, and every rank that learns of them raises a
MismatchError with the views of all. Ranks that only are late contradict nobody: they are waited for until the deadline,
and the CommunicationTimeout then names them and what they did last.

MPI's own all-reduce takes no tags. Where it does not notice by itself that ranks have given it different things, it
may end with a wrong result; the stamp then shows it at the next operation that has one.

Cost: nothing per message; a look for messages every 0.1 s while a thread waits, every 0.25 s while none does. A rank
that stands still sends P - 1 messages of some KB after 1, 2, 4, 8 s and every 8 s from then on.
"""

import math
import time
from array import array
from collections.abc import Callable, Iterable
from typing import Any

from mpi4py import MPI

from allreduce_sgd.comm.ledger import Ledger, Report, Views
from allreduce_sgd.comm.progress import Program
from allreduce_sgd.errors import CommunicationError, MismatchError

__all__ = ["Watch"]

_STALL_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 8.0
# As long at most to wait for answers after a contradiction was seen, so that all ranks' views are named.
_ANSWERS_SECONDS = 1.5
_INQUIRY_SECONDS = 2.0


class Watch:
    """Watches one communicator's collectives, which `ledger` lists.

    Messages go over the mpi4py communicator `comm`, under the tag `tag` that nothing else uses there. All methods are
    called with the lock around MPI held. `elsewhere` is asked what else this process has under way.
    """

    def __init__(self, comm: Any, tag: int, ledger: Ledger, timeout_seconds: float) -> None:
        self.elsewhere: Callable[[], str | None] = lambda: None
        self._comm = comm
        self._tag = tag
        self._ledger = ledger
        self._rank: int = comm.Get_rank()
        self._size: int = comm.Get_size()
        self._stall_seconds = min(_STALL_SECONDS, timeout_seconds / 4)
        self._answers_seconds = min(_ANSWERS_SECONDS, timeout_seconds / 4)
        self._views = Views(self._size)
        self._questions = 0
        self._answered = [0] * self._size
        self._sent = array("q", [0] * self._size)
        self._received = array("q", [0] * self._size)
        self._sending: list[tuple[Any, bytes]] = []
        self._receiving: list[tuple[Any, bytearray, int]] = []
        self._waits_in: int | None = None
        self._quiet_since_seconds = 0.0
        self._pause_seconds = self._stall_seconds
        self._asked_about: int | None = None
        self._differs_since_seconds = math.inf
        self._failure: str | None = None

    def look(self, waits_in: int | None, moved: bool, now_seconds: float) -> CommunicationError | None:
        """Answer those who asked, ask where nothing has moved for long, and return the error that ends all this.

        `waits_in` is the number of the collective under way; `moved` says whether it has got on since the last look.
        """
        quiet_seconds = now_seconds - self._quiet_since_seconds
        if moved or waits_in is None or waits_in != self._waits_in:
            self._quiet_since_seconds = now_seconds
            self._pause_seconds = self._stall_seconds
        elif quiet_seconds >= self._pause_seconds and self._failure is None:
            self._ask()
            self._pause_seconds = quiet_seconds + min(quiet_seconds, _LONGEST_PAUSE_SECONDS)
        self._waits_in = waits_in
        return self._verdict(now_seconds) if self._exchange() and self._failure is None else None

    def inquire(self, problem: Exception) -> Program:
        """The end of an operation that met with `problem`: raise it, unless the ranks turn out to differ.

        What differs `look` finds, which ends the operation from outside.
        """
        deadline_seconds = time.perf_counter() + _INQUIRY_SECONDS
        question = self._ask()
        while time.perf_counter() < deadline_seconds:
            yield False
            # An answer to what was asked earlier may be from before the other came to what differs.
            if self._asked_about is None and self._all_answered(question):
                break
        raise problem

    def failed(self, why: str) -> None:
        """Tell all ranks that the collectives have ended here."""
        if self._failure is None:
            self._failure = why
            self._tell(range(self._size), False, 0, self._position())

    def explain(self, number: int) -> str:
        """Say why the collective `number` may not have ended, as far as the others have told."""
        difference = self._views.difference()
        if difference is not None:
            return difference.text
        if self._questions == 0 and not self._views.numbers:
            return "a rank is stuck, gone or late"
        return self._views.missing(self._rank, number if self._waits_in is None else min(number, self._waits_in))

    def drain(self) -> Program:
        """Receive what is still on its way. All ranks must run it, after a barrier, when nobody looks any more."""
        expected = array("q", [0] * self._size)
        request = self._comm.Ialltoall(self._sent, expected)
        while not request.Test() or self._sending or self._receiving or self._received != expected:
            self._exchange(answer=False)
            yield False

    def _ask(self, about: int | None = None) -> int:
        self._questions += 1
        self._tell(range(self._size), True, self._questions, self._position() if about is None else about)
        return self._questions

    def _position(self) -> int:
        return self._ledger.launched if self._waits_in is None else self._waits_in

    def _tell(self, ranks: Iterable[int], asks: bool, question: int, about: int) -> None:
        launched, waits_in = self._ledger.launched, self._waits_in
        entries = self._ledger.around([about, self._position()])
        report = Report(asks, question, about, launched, waits_in, self._failure, self.elsewhere(), entries)
        message = report.to_bytes()
        for rank in ranks:
            if rank != self._rank:
                self._sending.append((self._comm.Isend([message, MPI.BYTE], rank, self._tag), message))
                self._sent[rank] += 1

    def _exchange(self, answer: bool = True) -> bool:
        """Move messages on; say whether there is anything new to judge."""
        self._sending = [entry for entry in self._sending if not entry[0].Test()]
        status = MPI.Status()
        while (message := self._comm.Improbe(MPI.ANY_SOURCE, self._tag, status)) is not None:
            data = bytearray(status.Get_count(MPI.BYTE))
            self._receiving.append((message.Irecv([data, MPI.BYTE]), data, status.Get_source()))
        arrived = [entry for entry in self._receiving if entry[0].Test()]
        if not arrived:
            return self._asked_about is not None
        self._receiving = [entry for entry in self._receiving if entry not in arrived]
        for _, data, rank in arrived:
            self._received[rank] += 1
            self._hear(rank, Report.from_bytes(data), answer)
        return True

    def _hear(self, rank: int, report: Report, answer: bool) -> None:
        self._views.add(rank, report)
        if not report.asks:
            self._answered[rank] = max(self._answered[rank], report.question)
        elif answer:
            self._tell([rank], False, report.question, report.about)

    def _verdict(self, now_seconds: float) -> CommunicationError | None:
        self._views.add_entries(self._rank, self._ledger.entries(self._views.numbers))
        difference = self._views.difference()
        if difference is None:
            # Who has failed has told all ranks by itself.
            self._failure = self._views.failure()
            return None if self._failure is None else CommunicationError(self._failure)
        asked_about, self._asked_about = self._asked_about, difference.ask_about
        if asked_about != difference.ask_about:
            self._differs_since_seconds = now_seconds
            self._ask(difference.ask_about)
            return None
        late = now_seconds > self._differs_since_seconds + self._answers_seconds
        complete = self._views.knows_all_of(difference.ask_about, self._rank)
        return MismatchError(difference.text) if late or complete else None

    def _all_answered(self, question: int) -> bool:
        return all(answered >= question for rank, answered in enumerate(self._answered) if rank != self._rank)
