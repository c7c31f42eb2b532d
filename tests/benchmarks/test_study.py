"""Specs of studies: what they say, which cells and rates come of them, and what is refused in which words."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from allreduce_sgd.errors import ConfigError
from benchmarks.study.cells import all_cells, check_cells, flags_of, folder_name, rates_of
from benchmarks.study.progress import Progress
from benchmarks.study.results import Cell, ResultsFile, Run, read_study, write_study
from benchmarks.study.spec import Spec, read_spec, shipped
from benchmarks.study.tables import tables
from benchmarks.study.tuning import choices
from tests.benchmarks.study_runs import cell, run

TOP = """
name = "small"
dataset = "digits"
model = "mlp"
target_accuracy = 0.9
epochs = 2
evaluate_every_samples = 192
"""
TUNING = "[tuning]\nlr = [0.01, 0.1]\n"
GRID = '[grid]\nranks = [2, 4]\nstrategies = ["sync"]\nglobal_batch_sizes = [32, 64]\n'


def serial(batches: str) -> str:
    return f"[baselines]\nserial_batches = [{batches}]\n"


def spec_of(tmp_path: Path, text: str) -> Spec:
    file = tmp_path / "spec.toml"
    file.write_text(text)
    spec = read_spec(str(file))
    check_cells("spec.toml", spec, all_cells(spec, 2))
    return spec


@pytest.mark.parametrize("name", shipped())
def test_the_shipped_specs_are_ones_that_training_takes(name: str) -> None:
    spec = read_spec(name)
    cells = all_cells(spec, 2)
    check_cells(name, spec, cells)
    assert spec.name == name
    assert any(cell.contender == "allreduce_sgd" for cell in cells)
    folders = {folder_name(cell, 0.1, 0) for cell in cells}
    assert len(folders) == len({cell.label for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TOP.replace("0.9", "1.5") + TUNING + GRID, "target_accuracy: 1.5 is not a fraction"),
        (TOP.replace('"mlp"', "7") + TUNING + GRID, "model: 7 is not a line of text"),
        (TOP.replace("epochs = 2", "") + TUNING + GRID, "epochs: is missing"),
        (TOP.replace("192", "96") + TUNING + GRID, "evaluate_every_samples: 96 is not a multiple of the mini-batch 64"),
        (TOP.replace('"small"', '"../up"') + TUNING + GRID, "name: '../up' does not serve for a folder"),
        ("colour = 1\n" + TOP + TUNING + GRID, "colour: unknown key; allowed are"),
        (TOP + TUNING + "rate = 1\n" + GRID, "tuning.rate: unknown key; allowed are batch_size, lr, "),
        (TOP + "[tuning]\nlr = [0.1, 0.01]\n" + GRID, "tuning.lr: give the rates in ascending order"),
        (TOP + "[tuning]\nlr = 0.1\n" + GRID, "tuning.lr: 0.1 is not a list"),
        (TOP + TUNING + 'scaling = "linear"\n' + GRID, "tuning.batch_size: "),
        (TOP + GRID, "tuning.lr: is missing"),
        (TOP + TUNING + GRID.replace("[2, 4]", "[1, 2]"), "grid.ranks: 1: at least 2"),
        (TOP + TUNING + GRID.replace("sync", "magic"), "grid.strategies[0].name: unknown value 'magic'"),
        (TOP + TUNING + GRID + 'networks = ["fast"]\n', "grid.networks: 'fast' is neither"),
        (TOP + TUNING + GRID + 'compressions = ["zip"]\n', "grid.compressions: unknown value 'zip'"),
        (TOP + TUNING + GRID + '[trainer]\nmomentum = "much"\n', "trainer: momentum: 'much' is not a number"),
        (TOP + TUNING + GRID + "[trainer]\nlr = 0.1\n", "trainer.lr: the study sets it itself"),
        (TOP + TUNING + GRID + "[trainer]\nmomentun = 0.1\n", "trainer.momentun: is no flag of the trainer"),
        (TOP + TUNING + GRID + "[trainer]\nperiod = 4\n", "--period: --strategy sync has no use for it"),
        (TOP + TUNING + GRID + "[baselines]\ntorch_ddp = 1\n", "baselines.torch_ddp: 1 is not true or false"),
        (TOP + TUNING + GRID.replace('["sync"]', '["sync", "sync"]'), "two cells are called 'sync, 2 ranks, batch 32'"),
        (TOP + TUNING + GRID + serial("0"), "baselines.serial_batches: 0 is not a whole"),
        (TOP + TUNING + GRID + serial("{lr = [1, 2]}"), "baselines.serial_batches[0].batch: is missing"),
        (TOP + TUNING + GRID + serial("{batch = 1, lr = [2, 1]}"), "serial_batches[0].lr: give the rates in ascending"),
        (TOP + TUNING + GRID + serial("{batch = 1, rate = 1}"), "baselines.serial_batches[0].rate: unknown key"),
        (TOP + TUNING + GRID + serial("{batch = 1, lr = [1]}"), "baselines.serial_batches: 1 rate for batch 1, but 2"),
        (TOP + TUNING + GRID + serial("1, {batch = 1, lr = [1, 2]}"), "two cells are called 'serial, batch 1'"),
        (
            TOP + TUNING + GRID + "[baselines]\ntorch_ddp = true\n[trainer]\naccumulate = 2\n",
            "torch DDP, 2 ranks, batch 32: --accumulate 2: the loop with torch's DDP has no use for it",
        ),
        (TOP + TUNING, "no cells: [grid] needs ranks"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_bad_spec_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec_of(tmp_path, text)
    assert said in str(caught.value)
    assert "spec.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_combination_is_a_cell_and_has_its_flags(tmp_path: Path) -> None:
    grid = """
        [grid]
        ranks = [2, 4]
        strategies = ["sync", {name = "local", label = "rare", flags = {period = 8, momentum = 0.5}}]
        global_batch_sizes = [32, 64]
        compressions = ["none", "fp16"]
        networks = ["none", "1gbit"]
        [baselines]
        serial_batches = [1, 64]
        all_cores = true
        torch_ddp = true
        [trainer]
        bucket-mb = 2.0
    """
    spec = spec_of(tmp_path, TOP + "noise_scale = true\n" + TUNING + grid)
    cells = {cell.label: cell for cell in all_cells(spec, 2)}
    contenders = [cell.contender for cell in cells.values()]
    assert contenders.count("serial") == contenders.count("one_rank_all_cores") == 2
    assert contenders.count("torch_ddp_gloo") == 2 * 2 * 2
    assert contenders.count("allreduce_sgd") == 2 * 2 * 2 * 2 * 2
    assert "one_rank_all_cores" not in {cell.contender for cell in all_cells(spec, 1)}

    rare = cells["rare, 4 ranks, batch 32, fp16, 1gbit"]
    assert (rare.strategy, rare.ranks, rare.threads, rare.network) == ("local", 4, 1, "1gbit")
    flags = flags_of(spec, rare, 0.1, 3)
    assert (flags["period"], flags["momentum"], flags["compression"], flags["bucket-mb"]) == (8, 0.5, "fp16", 2.0)
    assert (flags["evaluate-every"], flags["seed"], flags["threads"]) == (6, 3, 1)
    assert "noise-scale" not in flags
    assert flags_of(spec, cells["sync, 2 ranks, batch 64"], 0.1, 0)["noise-scale"] == 1
    often = replace(spec, evaluate_every_samples=64 * 33)
    assert flags_of(often, cells["sync, 2 ranks, batch 64"], 0.1, 0)["noise-scale"] == 2
    assert "noise-scale" not in flags_of(spec, cells["serial, batch 64"], 0.1, 0)
    peer = flags_of(spec, cells["torch DDP, 2 ranks, batch 64, 1gbit"], 0.1, 0)
    assert peer["momentum"] == 0.9
    assert "bucket-mb" not in peer
    assert "strategy" not in peer


def test_all_cells_choose_from_as_many_rates(tmp_path: Path) -> None:
    linear = TUNING + 'scaling = "linear"\nbatch_size = 32\n'
    spec = spec_of(tmp_path, TOP + linear + GRID + serial("1"))
    assert spec.tuning.rates(32) == (0.01, 0.1)
    assert spec.tuning.rates(64) == (0.02, 0.2)
    assert {len(rates_of(spec, cell)) for cell in all_cells(spec, 2)} == {2}
    spec = spec_of(tmp_path, TOP + linear.replace("linear", "sqrt") + GRID)
    assert spec.tuning.rates(64) == pytest.approx((0.01 * math.sqrt(2), 0.1 * math.sqrt(2)), rel=1e-5)
    assert spec_of(tmp_path, TOP + TUNING + GRID).tuning.rates(64) == (0.01, 0.1)


def test_a_serial_mini_batch_may_have_rates_of_its_own(tmp_path: Path) -> None:
    far_off = TUNING + 'scaling = "sqrt"\nbatch_size = 64\n' + GRID + serial("{batch = 1, lr = [0.001, 0.002]}, 64")
    spec = spec_of(tmp_path, TOP + far_off)
    rates = {cell.label: rates_of(spec, cell) for cell in all_cells(spec, 2)}
    assert rates["serial, batch 1"] == (0.001, 0.002)
    assert rates["serial, batch 64"] == rates["sync, 2 ranks, batch 64"] == (0.01, 0.1)


def test_rates_are_for_the_samples_that_an_update_is_made_from(tmp_path: Path) -> None:
    softly = '{name = "server-staleness", label = "softsync", flags = {softsync = 1, servers = 2}}'
    strategies = f'strategies = ["sync", "hogwild", "server-async", {softly}]'
    grid = f"[grid]\nranks = [2, 4]\n{strategies}\nglobal_batch_sizes = [64]\n"
    spec = spec_of(tmp_path, TOP + TUNING + 'scaling = "linear"\nbatch_size = 32\n' + grid)
    rates = {(cell.strategy, cell.ranks): rates_of(spec, cell) for cell in all_cells(spec, 2)}
    assert rates["sync", 2] == rates["sync", 4] == (0.02, 0.2)
    assert rates["hogwild", 2] == (0.01, 0.1)
    assert rates["hogwild", 4] == (0.005, 0.05)
    assert rates["server-async", 2] == (0.02, 0.2)
    assert rates["server-async", 4] == pytest.approx((0.02 / 3, 0.2 / 3), rel=0.02)
    # Both workers' gradients make one update.
    assert rates["server-staleness", 4] == (0.02, 0.2)


def test_the_rate_that_needs_fewest_samples_counts_and_else_the_most_accurate() -> None:
    fast, failing, edge = (cell("allreduce_sgd", 64, label) for label in ("fast", "failing", "edge"))

    def tried(where: Cell, lr: float, samples: list[float], accuracy: float = 0.9) -> list[Run]:
        return [run(where, min(each, 9), each, 1000 + n, lr, "tuning", accuracy) for n, each in enumerate(samples)]

    runs = [
        *tried(fast, 0.1, [9, 9, 9]),
        *tried(fast, 0.2, [5, 6, math.inf]),
        *tried(fast, 0.4, [1, math.inf, math.inf]),
        *tried(failing, 0.1, [math.inf], 0.5),
        *tried(failing, 0.2, [math.inf], 0.8),
        *tried(failing, 0.4, [math.inf], 0.1),
        *tried(edge, 0.1, [8], 0.91),
        *tried(edge, 0.2, [8], 0.92),
        run(fast, 0.1, 1, lr=0.8),
    ]
    chosen = choices(runs)
    assert {where.label: choice.lr for where, choice in chosen.items()} == {"fast": 0.2, "failing": 0.2, "edge": 0.2}
    assert [choice.on_edge for choice in chosen.values()] == [False, False, True]


def test_tables_show_misses_the_baseline_and_rates_on_the_edge() -> None:
    serial, ours, peer = cell("serial", 64), cell("allreduce_sgd", 64), cell("torch_ddp_gloo", 64)
    runs = [
        run(ours, 8, 900, 1000, 0.1, "tuning"),
        run(ours, 9, 800, 1000, 0.2, "tuning"),
        *(run(serial, seconds, 600, seed) for seed, seconds in enumerate((6, 6, 6))),
        *(run(ours, seconds, 600, seed, 0.2) for seed, seconds in enumerate((3, 3, 2))),
        *(run(peer, math.inf, math.inf, seed) for seed in range(3)),
    ]
    text = tables(runs)
    took, gained, notes = text.split("\n\n")
    assert "0.2*" in took
    assert "∞" in next(line for line in took.splitlines() if line.startswith("torch_ddp_gloo"))
    line = next(line for line in gained.splitlines() if line.startswith("allreduce_sgd"))
    assert "[2.00–3.00]" in line
    assert "serial 64" in notes
    assert "speed-up to accuracy 2.00" in notes
    assert "torch_ddp_gloo" not in notes
    assert "lr 0.2 is on the edge of its grid (0.1, 0.2)" in notes


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    where = Cell("labelled", "allreduce_sgd", "local", 2, 1, 64, flags=(("period", 8), ("staleness-lr", False)))
    runs = (run(where, 2, 128), run(where, math.inf, math.inf, seed=1))
    file = tmp_path / "results.jsonl"
    write_study(file, {"spec": {"name": "small", "target_accuracy": 0.9}}, runs)
    study = read_study(file)
    assert study.runs == runs
    assert (study.name, study.target_accuracy) == ("small", 0.9)
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match="not the results of a study"):
        read_study(file)


def test_a_study_that_goes_on_loses_no_run_of_before(tmp_path: Path) -> None:
    here, other = (Cell(f"serial, batch {batch}", "serial", "sync", 1, 1, batch) for batch in (32, 64))
    file, head = tmp_path / "results.jsonl", {"spec": {"name": "small", "target_accuracy": 0.9}}
    before = [run(cell, 2, 128, seed=seed) for cell in (here, other) for seed in (0, 1)]
    before = [replace(each, folder=f"runs/{place}", commit="old") for place, each in enumerate(before)]
    rates = {here: (0.1, 0.9), other: (0.1, 0.9)}
    first = ResultsFile(file, head, rates)
    for each in before:
        first.add(each)
    second = ResultsFile(file, head, rates)
    assert read_study(file).runs == tuple(before)
    again = replace(before[1], commit="new")
    second.add(again)
    assert read_study(file).runs == (again, before[0], *before[2:])
    # With another rate, what the cell measured before would count beside it.
    better = replace(before[2], folder="runs/better", lr=0.9)
    second.add(better)
    assert read_study(file).runs == (again, better, before[0])
    ResultsFile(file, head, {here: (0.1,), other: (0.1,)})
    assert read_study(file).runs == (again, before[0])
    ResultsFile(file, head, {other: (0.1,)})
    assert read_study(file).runs == ()


@pytest.mark.parametrize("task", [{"target_accuracy": 0.8}, {"hidden": "64"}, {"trainer": {"momentum": 0.5}}])
def test_runs_of_another_task_do_not_get_into_one_file(tmp_path: Path, task: dict[str, object]) -> None:
    cell = Cell("serial, batch 32", "serial", "sync", 1, 1, 32)
    file = tmp_path / "results.jsonl"
    spec = {"name": "small", "target_accuracy": 0.9, "trainer": {"momentum": 0.9}, "seeds": 5}
    ResultsFile(file, {"spec": spec}, {cell: (0.1,)}).add(run(cell, 2, 128))
    kept = file.read_text()
    with pytest.raises(ConfigError, match=f"have {next(iter(task))} = "):
        ResultsFile(file, {"spec": {**spec, **task}}, {cell: (0.1,)})
    assert file.read_text() == kept
    ResultsFile(file, {"spec": {**spec, "seeds": 3}}, {cell: (0.1,)})
    assert len(read_study(file).runs) == 1
    file.write_text(kept[:-10])
    with pytest.raises(ConfigError, match="not the results of a study"):
        ResultsFile(file, {"spec": spec}, {cell: (0.1,)})
    assert file.read_text() == kept[:-10]


def test_what_is_left_is_estimated_by_cell(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = cell("serial", 1), cell("serial", 64)
    with Progress([slow, slow, slow, fast, fast]) as progress:
        progress.starts(slow, 0.1, 0)
        progress.ended(slow, None)
        assert progress.left_seconds is None
        progress.ended(slow, 10.0)
        assert progress.left_seconds == 10 + 2 * 10
        progress.ended(fast, 1.0)
        assert progress.left_seconds == 10 + 1
