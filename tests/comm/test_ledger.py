"""What ranks launched is compared by numbers and stamps, and told so that people find the place."""

import subprocess
import sys

import pytest
import torch

from allreduce_sgd.comm.base import ReduceOp
from allreduce_sgd.comm.ledger import NEAR, NUMBER_SHIFT, Call, Ledger, Report, Views

SUM = ReduceOp.SUM
CALL: Call = ("all_reduce", 1000, torch.float32, SUM, "ring")
OTHERS: list[Call] = [
    ("reduce_scatter", 1000, torch.float32, SUM, "ring"),
    ("all_reduce", 1001, torch.float32, SUM, "ring"),
    ("all_reduce", 1000, torch.int32, SUM, "ring"),
    ("all_reduce", 1000, torch.float32, ReduceOp.MAX, "ring"),
    ("all_reduce", 1000, torch.float32, SUM, "chain"),
    ("all_reduce", 1000, torch.float32, None, "ring"),
    ("barrier", 0, None, None, None),
]


def launched(*calls: Call) -> Ledger:
    ledger = Ledger()
    for call in calls:
        ledger.launch(call)
    return ledger


def report(
    ledger: Ledger,
    about: int,
    waits_in: int | None = None,
    failure: str | None = None,
    elsewhere: str | None = None,
) -> Report:
    entries = ledger.around([about, ledger.launched])
    told = Report(False, 0, about, ledger.launched, waits_in, failure, elsewhere, entries)
    return Report.from_bytes(told.to_bytes())


def views(*ledgers: Ledger, about: int) -> Views:
    made = Views(len(ledgers))
    for rank, ledger in enumerate(ledgers):
        made.add(rank, report(ledger, about))
    return made


def test_stamps_tell_every_call_from_every_other() -> None:
    stamps = [launched(call).launch(CALL) for call in (CALL, *OTHERS)]
    assert len(set(stamps)) == len(stamps)
    assert {stamp >> NUMBER_SHIFT for stamp in stamps} == {2}
    assert launched(CALL).launch(CALL) == stamps[0]


def test_stamps_keep_a_difference_for_ever_and_see_an_exchange() -> None:
    left, right = launched(CALL, OTHERS[0]), launched(OTHERS[0], CALL)
    for _ in range(10_000):
        assert left.launch(CALL) != right.launch(CALL)


def test_stamps_are_the_same_in_every_process() -> None:
    code = (
        "import torch\n"
        "from allreduce_sgd.comm.base import ReduceOp\n"
        "from allreduce_sgd.comm.ledger import Ledger\n"
        "print(Ledger().launch(('all_reduce', 1000, torch.float32, ReduceOp.SUM, 'ring')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == Ledger().launch(CALL)


def test_the_first_difference_is_described_with_all_views() -> None:
    usual, other = launched(CALL, CALL, CALL), launched(CALL, OTHERS[1], CALL)
    difference = views(usual, usual, other, usual, about=3).difference()
    assert difference is not None
    assert (difference.number, difference.ask_about) == (2, 2)
    assert difference.text == (
        "all_reduce no. 2: ranks 0, 1, 3 have 1000 float32 (sum, ring), rank 2 has 1001 float32 (sum, ring) "
        "(the one before, all_reduce no. 1 of 1000 float32 (sum, ring), was the same)"
    )
    assert views(usual, usual, about=3).difference() is None


def test_other_operations_are_described_by_their_names() -> None:
    difference = views(launched(CALL), launched(OTHERS[-1]), Ledger(), about=1).difference()
    assert difference is not None
    assert difference.text == (
        "collective no. 1: rank 0 has all_reduce of 1000 float32 (sum, ring), rank 1 has barrier; "
        "rank 2 has not come to it"
    )


@pytest.mark.parametrize("first", [1, 2, 17, 60, 199])
def test_an_early_difference_is_found_by_asking(first: int) -> None:
    ledgers = [Ledger(), Ledger()]
    for number in range(1, 201):
        for rank, ledger in enumerate(ledgers):
            ledger.launch(OTHERS[0] if (rank, number) == (1, first) else CALL)
    known = views(*ledgers, about=200)
    asked_about: list[int] = []
    while (difference := known.difference()) is not None and difference.ask_about not in asked_about:
        asked_about.append(difference.ask_about)
        for rank, ledger in enumerate(ledgers):
            known.add(rank, report(ledger, difference.ask_about))
            assert known.knows_all_of(difference.ask_about, own_rank=1 - rank)
    assert len(asked_about) <= 5
    assert difference is not None
    assert difference.number == first
    assert f"no. {first}: rank 0 has all_reduce of 1000" in difference.text


def test_what_nobody_remembers_is_said_to_be_long_ago() -> None:
    ledgers = launched(CALL), launched(OTHERS[0])
    for ledger in ledgers:
        for _ in range(1000):
            ledger.launch(CALL)
    known = views(*ledgers, about=1001)
    known.add(0, report(ledgers[0], 1))
    assert known.knows_all_of(1, own_rank=1)
    difference = known.difference()
    assert difference is not None
    number = 1001 - NEAR
    assert difference.number == number
    assert difference.text == (
        f"before all_reduce no. {number} of 1000 float32 (sum, ring) ranks 0, 1 "
        "launched different collectives, long ago"
    )


def test_it_is_said_who_is_missing_and_what_they_did_last() -> None:
    known = Views(6)
    assert known.missing(0, 2) == "ranks 1, 2, 3, 4, 5 have not answered; rank 0 has come to it"
    known.add(1, report(launched(CALL), 2))
    known.add(2, report(launched(CALL), 2, elsewhere="receive from rank 0 (tag 7)"))
    known.add(3, report(launched(CALL, CALL), 2, waits_in=1))
    known.add(4, report(launched(CALL, CALL), 2, waits_in=2))
    name = "all_reduce no. 1 of 1000 float32 (sum, ring)"
    assert known.missing(0, 2) == (
        f"rank 1 has not started it: its last was {name}; "
        f"rank 2 has not started it: its last was {name} (under way there: receive from rank 0 (tag 7)); "
        f"rank 3 is still in {name}; rank 5 has not answered; ranks 0, 4 have come to it"
    )
    known.add(5, report(Ledger(), 2))
    assert known.missing(0, 2).endswith("rank 5 has not started it: it has started nothing; ranks 0, 4 have come to it")


def test_a_failure_is_told_with_its_rank() -> None:
    known = views(launched(CALL), launched(CALL), about=1)
    assert known.failure() is None
    known.add(1, report(launched(CALL), 1, failure="no more memory"))
    assert known.failure() == "rank 1 has failed: no more memory"
