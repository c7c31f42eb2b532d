from typing import Any

from benchmarks.targets import judge, verdict_table

MIB = 1 << 20


def row(contender: str, size_bytes: int, seconds: float, **others: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "op": "all_reduce",
        "contender": contender,
        "ours": contender not in ("mpi", "gloo"),
        "variant": "in_place",
        "private": False,
        "hosts": 1,
        "bytes": size_bytes,
        "median_seconds": seconds,
        "ratio_to_floor": None,
        "busbw_to_raw_tcp": None,
    }
    return {**common, **others}


def test_the_fastest_peer_is_chosen_by_size_and_the_worst_size_counts() -> None:
    rows = [
        row("mpi", 32 * MIB, 4.0),
        row("gloo", 32 * MIB, 5.0),
        row("ours", 32 * MIB, 1.0),
        row("mpi", 64 * MIB, 9.0),
        row("gloo", 64 * MIB, 6.0),
        row("ours", 64 * MIB, 3.0),
    ]
    (verdict,) = judge(rows)
    assert (verdict.worst, verdict.worst_bytes, verdict.met) == (2.0, 64 * MIB, False)
    (verdict,) = judge(rows[:3])
    assert (verdict.worst, verdict.met) == (4.0, True)


def test_small_messages_are_judged_by_the_difference_and_by_start_to_wait() -> None:
    rows = [row("mpi", 4096, 10e-6), row("ours", 4096, 29e-6, asynchronous_seconds=160e-6)]
    behind, start_to_wait = judge(rows)
    assert (round(behind.worst, 6), behind.met) == (19, True)
    assert (round(start_to_wait.worst, 6), start_to_wait.met) == (160, False)


def test_a_shared_result_is_held_against_the_floor() -> None:
    rows = [row("ours", size * MIB, 1.0, variant="shared_result", ratio_to_floor=size / 2) for size in (1, 2, 3)]
    (verdict,) = judge(rows)
    assert (verdict.worst, verdict.worst_bytes, verdict.met) == (1.5, 3 * MIB, False)


def test_between_hosts_the_links_are_the_measure() -> None:
    rows = [row("ours", 8 * MIB, 1.0, hosts=2, busbw_to_raw_tcp=0.96), row("mpi", 8 * MIB, 9.0, hosts=2)]
    (verdict,) = judge(rows)
    assert (verdict.measure, verdict.worst, verdict.met) == ("link rate ÷ raw TCP", 0.96, True)


def test_private_buffers_and_other_operations_are_not_judged() -> None:
    rows = [
        row("mpi", 32 * MIB, 4.0),
        row("ours, private buffer", 32 * MIB, 3.0, private=True),
        row("ours", 32 * MIB, 1.0, op="broadcast"),
    ]
    assert judge(rows) == []


def test_the_table_says_which_way_each_target_points() -> None:
    rows = [row("mpi", 4096, 10e-6), row("ours", 4096, 5e-6), row("mpi", MIB, 4.0), row("ours", MIB, 1.0)]
    lines = [line.split() for line in verdict_table(judge(rows)).splitlines()]
    assert lines[2][-3:] == ["≥", "1.6", "yes"]
    assert lines[3][-3:] == ["≤", "20", "yes"]
