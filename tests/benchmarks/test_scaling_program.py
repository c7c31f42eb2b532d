"""The program: its modes end to end, what they print and write, and what they refuse."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize, Network
from benchmarks.scaling.__main__ import main
from benchmarks.scaling.accuracy import Method, from_study
from benchmarks.scaling.figures import draw
from benchmarks.scaling.presets import PRESETS
from benchmarks.scaling.profile import Compute, Profile
from benchmarks.scaling.published import CASES, published_rows
from benchmarks.scaling.reductions import Reductions
from benchmarks.scaling.step_probe import Measured
from benchmarks.scaling.stepping import Plan, step_time
from benchmarks.scaling.validate import at_rate, predicted_rows
from benchmarks.study.results import Cell, Run, write_study
from tests.benchmarks.study_runs import run as study_run
from tests.warm_start import mpirun

GIVEN = ["--s-min", "100", "--b-crit", "512"]


def a_compute(batch: int, model: str = "mlp512") -> Compute:
    sizes = (1_605_632, 2048, 1_048_576, 2048, 20_480, 40)
    arrivals = tuple(1e-4 * batch * seconds for seconds in (0.5, 0.5, 0.25, 0.25, 0.05, 0.05))
    return Compute(f"{model}-b{batch}", batch, sizes, 3e-5 * batch, 6e-5 * batch, 5e-4, arrivals, 1.3)


def a_profile() -> Profile:
    link = LinkBySize((), (LinkCost(50e-6, 1e-9, 1e-10),))
    computes = (a_compute(16), a_compute(64), a_compute(64, "cnn"))
    return Profile(computes, link, 1e-5, ranks=2, hosts=2, cores=4)


@pytest.fixture
def profile_file(tmp_path: Path) -> Path:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"rows": a_profile().rows()}))
    return file


def run(mode: str, profile: Path, *flags: str) -> int:
    return main([mode, "--profile", str(profile), *flags])


def test_predict_prints_writes_and_draws(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, figures = tmp_path / "record.json", tmp_path / "figures"
    flags = ["--ranks", "1,2,64", "--strategies", "sync,local", "--scaling", "weak,strong", "--network", "10gbe"]
    flags += ["--workloads", "mlp512-b64", *GIVEN]
    assert run("predict", profile_file, *flags, "--json", str(record), "--figures", str(figures)) == 0
    printed = capsys.readouterr().out
    assert "SIMULATED" in printed
    assert "≈" in printed
    rows = json.loads(record.read_text())["rows"]
    assert {(row["strategy"], row["scaling"], row["ranks"]) for row in rows} == {
        (strategy, scaling, ranks)
        for strategy in ("sync", "local")
        for scaling in ("weak", "strong")
        for ranks in (1, 2, 64)
    }
    assert all(row["kind"] == "prediction" and row["simulated"] for row in rows)
    names = ["scaling_speed_up.png", "scaling_step_time.png", "scaling_to_accuracy.png"]
    assert sorted(path.name for path in figures.iterdir()) == names


def test_advice_keeps_to_the_efficiency_and_tells_what_others_cost(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    flags = ["--ranks", "1,2,8,64", "--network", "25gbe", "--min-efficiency", "0.4", *GIVEN, "--json", str(record)]
    assert run("advise", profile_file, *flags) == 0
    assert "recommended" in capsys.readouterr().out
    best, *others = json.loads(record.read_text())["rows"]
    assert best["choice"] == "recommended"
    assert best["strategy"] == "sync"
    assert best["accuracy_efficiency"] >= 0.4
    rivals = [row for row in others if row["strategy"] == "sync" and row["accuracy_efficiency"] >= 0.4]
    assert rivals
    assert all(best["seconds_to_target"] <= row["seconds_to_target"] for row in rivals)
    fewest = next(row for row in others if row["choice"] == "fewest rank-hours")
    assert all(fewest["rank_hours"] <= row["rank_hours"] for row in others if row["strategy"] == "sync")


def a_run(strategy: str, ranks: int, batch: int, steps: float, seed: int, **flags: Any) -> Run:
    cell = Cell("a cell", "allreduce_sgd", strategy, ranks, 1, batch, flags=tuple(flags.items()))
    return study_run(cell, math.inf if math.isinf(steps) else 1.0, batch * steps, seed)


def a_study(file: Path, *others: Run, batches: Sequence[int] = (16, 64, 256), **spec: Any) -> Path:
    """Write a study whose synchronous runs lie on the curve S_min = 100, B_crit = 256."""
    runs = [a_run("sync", 2, batch, 100 * (1 + 256 / batch), seed) for batch in batches for seed in (0, 1)]
    task = {"model": "mlp", "hidden": "512,512", "dataset": "fashion-mnist", **spec}
    write_study(file, {"spec": {"name": "made up", "target_accuracy": 0.9, **task}}, [*runs, *others])
    return file


def test_a_study_gives_the_steps(profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [a_run("local", 2, 128, 1234.0, 0), a_run("local", 8, 512, 50.0, 0, inner_state="average")]
    file, record = a_study(tmp_path / "results.jsonl", *others), tmp_path / "record.json"
    flags = ["--ranks", "2,4,8", "--strategies", "sync,local", "--workloads", "mlp512-b64", "--study", str(file)]
    assert run("predict", profile_file, *flags, "--json", str(record)) == 0
    found = {(row["strategy"], row["ranks"]): row for row in json.loads(record.read_text())["rows"]}
    assert found["sync", 4]["steps_to_target"] == pytest.approx(200, rel=1e-3)
    # The period that local SGD has where nothing is said.
    assert (found["local", 2]["steps_to_target"], found["local", 2]["steps_basis"]) == (1234, "measured")
    # Another inner state is another method.
    assert found["local", 8]["steps_basis"] == found["local", 4]["steps_basis"] == "assumed"
    assert [found["sync", ranks]["beyond_study"] for ranks in (2, 4, 8)] == [False, False, True]
    printed = capsys.readouterr().out
    assert "≈: no run tells" in printed
    assert "*: smaller or larger than all batches of the study" in printed
    assert "6 runs, 0 more missed it, batches 16 to 256" in printed


def test_another_delay_or_most_runs_missed_is_not_taken_for_steps(tmp_path: Path) -> None:
    late = [a_run("delayed", 2, 64, 300.0, 0, delay=4)]
    local = [a_run("local", 2, 64, steps, seed) for seed, steps in enumerate((200.0, 210.0, math.inf, math.inf))]
    accuracy = from_study("--study", a_study(tmp_path / "results.jsonl", *late, *local))
    assert accuracy.steps(Method("delayed", 1, 1), 2, 64).basis == "assumed"
    assert accuracy.steps(Method("delayed", 1, 4), 2, 64).count == 300
    assert math.isinf(accuracy.steps(Method("local", 8), 2, 64).count)


@pytest.mark.parametrize("batches", ["64", "32,64,128,4096"])
def test_advice_shows_what_missed_the_target(
    batches: str, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = [a_run(name, 2, 64, math.inf, seed) for name in ("local", "delayed") for seed in range(3)]
    file = a_study(tmp_path / "results.jsonl", *missed)
    flags = ["--ranks", "2", "--global-batches", batches, "--study", str(file), "--workload", "mlp512-b64"]
    assert run("advise", profile_file, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    for strategy in ("local", "delayed"):
        assert any(line.startswith(strategy) and "∞" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--ranks", "2", "--network", "1,1000", "--b-crit", "1"], "that larger batches need more samples"),
        (["--ranks", "2", "--network", "9000,1", "--b-crit", "1e9"], "the network and the slowest rank"),
        (["--ranks", "1", "--b-crit", "512"], None),
    ],
)
def test_advice_names_what_costs_most(
    flags: list[str], reason: str | None, profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags += ["--global-batches", "4096", "--s-min", "100", "--stragglers", "none", "--workload", "mlp512-b64"]
    assert run("advise", profile_file, *flags) == 0
    printed = capsys.readouterr().out
    assert ("what costs most" in printed) == (reason is not None)
    assert f"what costs most is {reason or ''}" in printed or reason is None


@pytest.mark.parametrize(
    ("spec", "trained"),
    [
        ({"model": "cnn"}, "cnn"),
        ({"hidden": "64,64"}, "mlp64"),
        ({"hidden": "512"}, "mlp"),
        ({"dataset": "digits"}, "mlp on digits"),
    ],
)
def test_a_study_of_another_model_is_refused(
    spec: dict[str, Any], trained: str, profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = a_study(tmp_path / "results.jsonl", **spec)
    assert run("advise", profile_file, "--workload", "mlp512-b64", "--study", str(file)) == 2
    said = f"scaling: error: --workload mlp512-b64: --study trained another model, {trained}\n"
    assert capsys.readouterr().err == said


def test_a_baseline_beyond_the_study_is_told(
    profile_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = a_study(tmp_path / "results.jsonl", batches=(512, 1024, 2048))
    flags = ["--ranks", "2", "--workload", "mlp512-b64", "--study", str(file)]
    assert run("advise", profile_file, *flags) == 0
    assert "the batch of the one rank is smaller or larger than all of the study" in capsys.readouterr().out
    assert run("predict", profile_file, *flags[:2], "--workloads", *flags[3:]) == 0
    assert ", beyond those of the study: " in capsys.readouterr().out


def test_a_codec_is_predicted_with_its_own_exchange(profile_file: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    flags = ["--ranks", "2,64", "--compression", "int8", "--workloads", "mlp512-b64", *GIVEN, "--json", str(record)]
    assert run("predict", profile_file, *flags) == 0
    two, many = json.loads(record.read_text())["rows"]
    assert two["algorithms"] == ["ring all-gather"]
    assert many["algorithms"] == ["rows to all, ring all-gather"]
    assert two["steps_basis"] == many["steps_basis"] == "assumed"


def a_measurement(name: str, ranks: int, seconds: float) -> Measured:
    return Measured(name, ranks, seconds, 0.9 * seconds, 1.1 * seconds, 3)


def test_validation_predicts_what_the_model_itself_would_measure() -> None:
    profile = a_profile()
    truth = a_compute(32)
    network = Reductions(Network(profile.link), "auto", profile.call_seconds)
    seconds = step_time(truth, 2, network, Plan()).seconds
    measured = {"mlp512-b32": a_measurement("mlp512-b32", 2, seconds)}
    fit = ("mlp512-b16", "mlp512-b64")
    rows = predicted_rows(profile, {"mlp512-b32": truth}, measured, fit, 2, "here", 4)
    assert {row["computing"]: row["error"] for row in rows} == {
        "modelled": pytest.approx(0, abs=0.02),
        "measured": pytest.approx(0, abs=1e-9),
    }
    assert all(row["oversubscription"] is None for row in rows)


def test_more_ranks_than_cores_get_a_factor_from_other_workloads() -> None:
    profile = a_profile()
    network = Reductions(Network(profile.link), "auto", profile.call_seconds)
    names = {f"mlp512-b{batch}": a_compute(batch) for batch in (16, 32, 64)}
    measured = {
        name: a_measurement(name, 8, 3 * step_time(compute, 8, network, Plan()).seconds)
        for name, compute in names.items()
    }
    (row,) = predicted_rows(profile, {}, measured, ("mlp512-b16", "mlp512-b64"), 2, "here", 4)
    assert row["workload"] == "mlp512-b32"
    assert row["oversubscription"] == pytest.approx(3)
    assert row["error"] == pytest.approx(0, abs=0.02)


def test_another_rate_changes_the_nominal_part_of_the_price_of_a_byte() -> None:
    link = LinkBySize((4096,), (LinkCost(1e-5, 2e-9, 1e-10), LinkCost(1e-5, 9e-9, 1e-10)))
    in_a_burst, limited = at_rate(link, 1.0, 0.1).costs
    assert limited.beta_seconds_per_byte == pytest.approx(80e-9 + 1e-9)
    assert in_a_burst.beta_seconds_per_byte == pytest.approx(20e-9)
    assert limited.alpha_seconds == 1e-5
    assert [cost.beta_seconds_per_byte for cost in at_rate(link, 1.0, 1.0).costs] == pytest.approx([2e-9, 9e-9])


def test_recorded_steps_are_held_against_their_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"bucket_ready_seconds": [0.01], "bucket_reduction_seconds": [0.02], "contention": 1.0}
    times = {"median_seconds": 0.04, "minimum_seconds": 0.03, "maximum_seconds": 0.05, "rounds": 3}
    row = {"workload": "w", "contender": "allreduce_sgd", "ranks": 2, "hosts": 2, **parts, **times}
    file, record = tmp_path / "step_time.json", tmp_path / "record.json"
    file.write_text(json.dumps({"rows": [{**row, "compute_seconds": [0.005, 0.01, 0.001]}, {"contender": "alone"}]}))
    assert main(["validate", "--records", str(file), "--json", str(record)]) == 0
    assert "median |error| 10.0% of 1 cases" in capsys.readouterr().out
    (found,) = json.loads(record.read_text())["rows"]
    assert found["predicted_seconds"] == pytest.approx(0.036)


def test_published_cases_are_simulated_with_their_inputs() -> None:
    rows = published_rows()
    assert {row["source"].split()[0] for row in rows} == {"Goyal", "Horovod", "PyTorch"}
    assert all(0 < row["predicted_efficiency"] <= 1 and row["inputs"] and row["simulated"] for row in rows)
    efficiency = {row["model"]: row["predicted_efficiency"] for row in rows if row["ranks"] == 512}
    # What all agree about: of the three, the model with the most bytes per unit of computing scales worst.
    assert min(efficiency, key=efficiency.__getitem__) == "VGG-16"


def test_every_preset_has_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: {preset.source}" in printed for name, preset in PRESETS.items())
    assert all("nominal" in preset.source and "assumed" in preset.source for preset in PRESETS.values())


def test_validation_and_published_figures_are_drawn(tmp_path: Path) -> None:
    fit = ("mlp512-b16", "mlp512-b64")
    measured = {"mlp512-b32": a_measurement("mlp512-b32", 2, 0.01)}
    rows = predicted_rows(a_profile(), {}, measured, fit, 2, "here", 4)
    drawn = draw([*rows, *published_rows(CASES[:1]), {"kind": "unknown"}], tmp_path)
    assert [path.name for path, _ in drawn] == ["scaling_validation.png", "scaling_published.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and caption for path, caption in drawn)
    assert draw([], tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "MODE: a mode is missing; choose from measure, predict"),
        (["guess"], "MODE: unknown mode 'guess'"),
        (["predict"], "--profile"),
        (["predict", "--profile", "missing.json"], "--profile missing.json: no record"),
        (["predict", "--profile", "PROFILE", "--network", "token-ring"], "--network: 'token-ring' is neither"),
        (["predict", "--profile", "PROFILE", "--network", "20,-1"], "--network: '20,-1' is neither"),
        (["predict", "--profile", "PROFILE", "--nics-per-node", "2"], "--nics-per-node: there are no nodes"),
        (["predict", "--profile", "PROFILE", "--stragglers", "normal:1"], "--stragglers: 'normal:1' is not"),
        (["predict", "--profile", "PROFILE", "--stragglers", "exponential:2"], "--stragglers"),
        (["predict", "--profile", "PROFILE", "--stragglers", "lognormal:30"], "SIGMA from 0 to 5"),
        (["predict", "--profile", "PROFILE", "--s-min", "10"], "--s-min, --b-crit: one needs the other"),
        (["predict", "--profile", "PROFILE", *GIVEN], "--workloads: a target is that of one model"),
        (["predict", "--profile", "PROFILE", "--workloads", "vgg"], "--workloads: unknown value 'vgg'"),
        (["predict", "--profile", "PROFILE", "--ranks", "0"], "--ranks: '0' is not a whole number"),
        (["predict", "--profile", "PROFILE", "--global-batch", "64"], "--global-batch: weak scaling has none"),
        (["predict", "--profile", "PROFILE", "--bucket-mb", "-1"], "--bucket-mb: '-1' is not a number above 0"),
        (["predict", "--profile", "PROFILE", "--strategies", "local", "--delay", "8"], "--delay 8: in local SGD less"),
        (["predict", "--profile", "PROFILE", "--figures", "no/such/folder"], "--figures no/such/folder"),
        (["advise", "--profile", "PROFILE"], "--study: advice needs a target"),
        (["advise", "--profile", "PROFILE", "--workload", "vgg", *GIVEN], "--workload: unknown value 'vgg'"),
        (["advise", "--profile", "PROFILE", "--workload", "a,b", *GIVEN], "--workload a,b: advice is for one"),
        (["advise", "--profile", "PROFILE", "--study", "missing"], "--study missing: not the results of a study"),
        (["advise", "--profile", "PROFILE", "--min-efficiency", "2", *GIVEN], "--min-efficiency"),
        (["measure", "--workloads", "mlp512"], "--workloads: unknown workload 'mlp512'; choose mlpW-bB"),
        (["measure", "--sizes", "4K"], "--sizes: at least three"),
        (["measure"], "start with mpirun -np 2 or more"),
        (["validate", "--hold-out", "cnn-b16"], "--hold-out: cnn-b16 is in --fit too"),
        (["validate", "--fit", "mlp512-b16", "--hold-out", "cnn-b16"], "--hold-out: cnn-b16 cannot be modelled"),
        (["validate", "--to-gbit", "1"], "--from-gbit, --to-gbit: one needs the other"),
        (["validate", "--from-gbit", "1", "--to-gbit", "2"], "--to-gbit: the other rate's --profile is missing"),
        (["validate", "--records", "missing.json"], "--records missing.json: no record of step_time"),
        (["presets", "--json", "no/such/folder/file"], "--json no/such/folder/file"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: Sequence[str], named: str, profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(profile_file) if each == "PROFILE" else each for each in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("scaling: error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_more_ranks_than_cores_are_not_measured_as_if_each_had_one() -> None:
    ranks = len(os.sched_getaffinity(0)) + 1
    finished = mpirun(ranks, ["-m", "benchmarks.scaling", "measure"])
    assert finished.status == 2
    assert finished.errors.count("scaling: error: mpirun -np") == 1


def test_two_ranks_measure_and_validate(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    flags = "--fit mlp64-b8,mlp64-b32 --hold-out mlp64-b16 --steps 2 --rounds 1 --algorithms ring --sizes 4K,16K,64K"
    finished = mpirun(2, ["-m", "benchmarks.scaling", "validate", *flags.split(), "--json", str(file)])
    assert finished.status == 0, finished.errors
    assert "median |error|" in finished.output
    record: dict[str, Any] = json.loads(file.read_text())
    validation = [row for row in record["rows"] if row["kind"] == "validation"]
    assert {row["computing"] for row in validation} == {"modelled", "measured"}
    assert all(row["measured_seconds"] > 0 and row["predicted_seconds"] > 0 for row in validation)
    profile = Profile.from_rows(record["rows"])
    assert [each.workload for each in profile.computes] == ["mlp64-b8", "mlp64-b32"]
    for each in profile.computes:
        assert 0 < min(each.arrival_seconds) <= max(each.arrival_seconds) <= each.backward_seconds
        assert sum(asdict(each)["parameter_bytes"]) == 4 * (784 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10)
    again = mpirun(2, ["-m", "benchmarks.scaling", "validate", "--profile", str(file), "--hold-out", "mlp64-b8"])
    assert again.status == 2
    assert again.errors.count("scaling: error: --hold-out: mlp64-b8 is in the profile") == 1
    # What was measured is what more ranks are predicted from.
    assert run("predict", file, "--ranks", "2,256", "--network", "measured") == 0
