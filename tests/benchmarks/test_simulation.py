import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize, Network
from benchmarks.cost_fit import Measurement, fit_link, oversubscription_factor, predict, profile, size_class
from benchmarks.cost_measurement import Timing
from benchmarks.prediction import compare, simulated_rows
from benchmarks.simulation import main
from benchmarks.simulation_tables import measured_tables, simulated_table
from tests.warm_start import mpirun

COLUMNS = {name: ALL_REDUCE[name].columns(None) for name in ("ring", "recursive-doubling", "tree")}
LINK = LinkBySize((4096,), (LinkCost(10e-6, 1e-9, 3e-11), LinkCost(40e-6, 3e-10, 3e-11)))
LENGTHS = [1 << k for k in range(8, 21)]
GAMMA = {1 << k: 3e-11 for k in range(24)}
CALL_SECONDS = 5e-6


def timings(ranks: Sequence[int], duplex: bool = True, slowed_from: int = 1 << 30) -> list[Timing]:
    """What a machine would measure that the model describes; from `slowed_from` ranks on it is three times slower."""
    found = []
    for name in sorted(COLUMNS):
        for size in ranks:
            for length in (0, *LENGTHS):
                plan = Measurement(name, size, length, 4, math.nan)
                seconds = CALL_SECONDS + predict(COLUMNS[name], plan, Network(LINK, duplex=duplex))
                seconds *= 3 if size >= slowed_from else 1
                found.append(Timing(Measurement(name, size, length, 4, seconds), 0.9 * seconds, 1.1 * seconds))
    return sorted(found, key=lambda each: (each.measurement.ranks, each.measurement.algorithm, each.n_bytes))


def errors(rows: Sequence[dict[str, Any]], ranks: int) -> list[float]:
    return [abs(row["error"]) for row in rows if row["kind"] == "measured" and row["ranks"] == ranks]


@pytest.mark.parametrize("duplex", [True, False])
def test_the_fit_finds_the_prices_of_a_machine_that_is_as_modelled(duplex: bool) -> None:
    rows, link = compare(timings([4], duplex), COLUMNS, GAMMA, cores=4, regimes=2, duplex=duplex)
    assert link.limits_bytes == (4096,)
    for found, wanted in zip(link.costs, LINK.costs, strict=True):
        assert vars(found) == pytest.approx(vars(wanted), rel=1e-3)
    assert max(errors(rows, 4)) < 1e-3
    assert [row["call_seconds"] for row in rows if row["kind"] == "link"] == [pytest.approx(CALL_SECONDS)] * 2
    measured = [row for row in rows if row["kind"] == "measured"]
    # Thirteen sizes of each algorithm: the first, the third, ... are fitted.
    assert [row["fitted"] for row in measured] == [index % 2 == 0 for index in range(len(LENGTHS))] * len(COLUMNS)
    assert max(abs(row["one_regime_error"]) for row in measured) > 0.2


def test_an_outlier_does_not_move_the_fit() -> None:
    measured = [each.measurement for each in timings([8]) if each.n_bytes > 0]
    profiles = [profile(COLUMNS[each.algorithm], each, duplex=True) for each in measured]
    slow = measured[7]
    measured[7] = Measurement(slow.algorithm, slow.ranks, slow.length, slow.item_bytes, 50 * slow.seconds)
    link = fit_link(measured, profiles, GAMMA, CALL_SECONDS, regimes=2)
    assert link.limits_bytes == (4096,)
    for found, wanted in zip(link.costs, LINK.costs, strict=True):
        assert vars(found) == pytest.approx(vars(wanted), rel=1e-3)


def test_fewer_ranks_are_predicted_and_more_ranks_than_cores_have_a_factor_of_their_own() -> None:
    rows, _ = compare(timings([2, 4, 8], slowed_from=8), COLUMNS, GAMMA, cores=4, regimes=2, duplex=True)
    measured = [row for row in rows if row["kind"] == "measured"]
    assert not any(row["fitted"] for row in measured if row["ranks"] == 2)
    assert {row["oversubscription"] for row in measured if row["ranks"] < 8} == {None}
    assert {row["ranks"]: row["oversubscription"] for row in measured}[8] == pytest.approx(3, rel=1e-2)
    # The prediction itself, and so the prices, know nothing of the factor.
    assert all(row["predicted_seconds"] < 0.4 * row["median_seconds"] for row in measured if row["ranks"] == 8)
    assert max(errors(rows, 2) + errors(rows, 8)) < 0.02
    tables = measured_tables(rows)
    crowded = tables.index("more ranks than cores (4)")
    assert tables.index("at most as many ranks as cores (4), held out: median error 0%") < crowded
    assert "3.00" in tables[crowded:]


def test_the_oversubscription_factor_is_a_median() -> None:
    assert oversubscription_factor([2.0, 9.0, 40.0], [1.0, 3.0, 1.0]) == 3.0


def test_size_classes_are_powers_of_two() -> None:
    assert [size_class(n_bytes) for n_bytes in (1, 2, 3, 4, 5, 4096, 4097)] == [1, 2, 4, 4, 8, 4096, 8192]


def test_nodes_add_the_two_level_algorithm_where_they_are_full() -> None:
    network = Network(LINK, LinkBySize((), (LinkCost(20e-6, 1e-9, 3e-11),)), ranks_per_node=4)
    rows = simulated_rows(COLUMNS, [2, 4, 6, 16], [4096, 1 << 20], network)
    two_level = [(row["ranks"], row["bytes"]) for row in rows if row["algorithm"] == "two-level"]
    assert two_level == [(16, 4096), (16, 1 << 20)]
    at_16 = {row["algorithm"]: row["seconds"] for row in rows if (row["ranks"], row["bytes"]) == (16, 1 << 20)}
    assert at_16["two-level"] < at_16["ring"]
    assert "two-level" in simulated_table(rows, "nodes of 4")


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.simulation_plot import plot_simulation

    rows, link = compare(timings([2]), COLUMNS, GAMMA, cores=2, regimes=2, duplex=True)
    rows += simulated_rows(COLUMNS, [2, 16, 64], [4096, 1 << 20], Network(link))
    plot_simulation(rows, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--algorithms", "nothing"], "--algorithms: unknown value 'nothing'; choose from ring"),
        (["--sizes", "4K,8K"], "--sizes: at least three"),
        (["--sizes", "4X"], "--sizes: '4X' is not a size"),
        (["--sizes", "2,4K,8K"], "one element has 4 bytes"),
        (["--simulate-ranks", "0"], "--simulate-ranks: '0' is not a whole number"),
        (["--placement", "random"], "--placement"),
        (["--between", "20,10"], "--between: there is nothing between nodes without --ranks-per-node"),
        (["--ranks-per-node", "2", "--between", "fast"], "--between: 'fast' is not a latency in µs"),
        ([], "start with mpirun -np 2"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_three_ranks_measure_fit_and_simulate(tmp_path: Path) -> None:
    file = tmp_path / "simulation.json"
    flags = "--algorithms ring,tree --sizes 4K:64K --rounds 3 --warmup 1 --simulate-ranks 2,64 --simulate-sizes 64K"
    run = mpirun(3, ["-m", "benchmarks.simulation", *flags.split(), "--json", str(file)])
    assert run.status == 0, run.errors
    assert "64 ranks" in run.output
    record = json.loads(file.read_text())
    assert set(record) == {"benchmark", "command", "commit", "machine", "versions", "rows"}
    measured = [row for row in record["rows"] if row["kind"] == "measured"]
    assert {(row["algorithm"], row["ranks"], row["bytes"]) for row in measured} == {
        (name, ranks, 1024 * kib) for name in ("ring", "tree") for ranks in (2, 3) for kib in (4, 8, 16, 32, 64)
    }
    assert all(row["median_seconds"] > 0 and row["predicted_seconds"] > 0 for row in measured)
    assert len([row for row in record["rows"] if row["kind"] == "simulated"]) == 4
