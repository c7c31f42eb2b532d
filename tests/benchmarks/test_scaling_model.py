"""The parts of the prediction against closed forms and simple numbers."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules import cost
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.schedules.cost import LinkCost
from allreduce_sgd.schedules.simulate import LinkBySize, Network
from benchmarks.hyperbola import fit_hyperbola
from benchmarks.overlap import Parts, overlap_bound
from benchmarks.scaling import reductions as reductions_module
from benchmarks.scaling.accuracy import SYNCHRONOUS, Accuracy, Method
from benchmarks.scaling.compute import compute_at, compute_like, workload
from benchmarks.scaling.handling import Handling, fit_handling
from benchmarks.scaling.prediction_rows import Predictor
from benchmarks.scaling.profile import Compute, Profile, read_profile
from benchmarks.scaling.reductions import Reductions
from benchmarks.scaling.stepping import Codec, Plan, StepTime, buckets_of, step_time
from benchmarks.scaling.stragglers import NO_STRAGGLERS, Stragglers, fit_stragglers

LINK = LinkCost(20e-6, 1e-9, 2e-10)
FREE = LinkCost(0.0, 0.0, 0.0)
FLAGS = 4 * (4 + 1)


def a_compute(contention: float = 1.0, batch: int = 32, model: str = "mlp512") -> Compute:
    """Four parameters of 1, 2, 3 and 4 MiB; gradients arrive from the last one to the first."""
    sizes = tuple(mib << 20 for mib in (1, 2, 3, 4))
    scale = batch / 32
    arrivals = tuple(scale * seconds for seconds in (0.020, 0.016, 0.011, 0.005))
    return Compute(f"{model}-b{batch}", batch, sizes, 0.010 * scale, 0.020 * scale, 0.004, arrivals, contention)


def a_step(plan: Plan, ranks: int = 4, stragglers: Stragglers = NO_STRAGGLERS, link: LinkCost = LINK) -> StepTime:
    return step_time(a_compute(), ranks, Reductions(Network(link), "ring"), plan, stragglers)


def test_one_rank_takes_its_computing_time_whatever_the_network() -> None:
    step = a_step(Plan(), ranks=1, stragglers=Stragglers("lognormal", 1.0))
    assert step.seconds == pytest.approx(0.034)
    assert (step.exposed_seconds, step.straggler_seconds, step.bytes_sent) == (0, 0, 0)


@pytest.mark.parametrize("plan", [Plan(), Plan("local", 8), Plan("delayed", 1, 1)])
def test_a_network_without_a_price_leaves_computing_alone(plan: Plan) -> None:
    assert a_step(plan, ranks=64, link=FREE).seconds == pytest.approx(0.034)


def test_a_step_is_the_overlap_bound_of_the_buckets_that_the_trainer_cuts() -> None:
    compute = a_compute(contention=1.5)
    plan = Plan(bucket_mb=5.0)
    assert buckets_of(compute, 5.0, 1.0) == [[3], [2, 1], [0]]
    sizes = [4 << 20, 5 << 20, (1 << 20) + FLAGS]
    alone = [cost.ring(4, size, LINK) for size in sizes]
    wanted = overlap_bound(Parts(0.010, [0.005, 0.016, 0.020], 0.020, 0.004, alone, 1.5))
    step = step_time(compute, 4, Reductions(Network(LINK), "ring"), plan)
    assert step.seconds == pytest.approx(wanted, rel=1e-3)
    assert step.buckets == 3
    assert step.bytes_sent == pytest.approx(2 * 3 / 4 * sum(sizes), rel=1e-3)
    parts = (step.forward_seconds, step.backward_seconds, step.optimizer_seconds, step.straggler_seconds)
    assert sum(parts) + step.exposed_seconds == pytest.approx(step.seconds)


def test_one_bucket_is_the_closed_form_of_the_ring_after_the_backward_pass() -> None:
    total = (10 << 20) + FLAGS
    alone = 2 * 3 * LINK.alpha_seconds + (2 * LINK.beta_seconds_per_byte + LINK.gamma_seconds_per_byte) * 3 / 4 * total
    step = a_step(Plan(bucket_mb=100.0, first_bucket_mb=100.0))
    assert step.reduction_seconds == pytest.approx(alone, rel=1e-3)
    assert step.exposed_seconds == pytest.approx(alone, rel=1e-3)


def test_local_sgd_divides_its_communication_by_the_period() -> None:
    every = a_step(Plan("local", 1))
    eighth = a_step(Plan("local", 8))
    assert eighth.exposed_seconds == pytest.approx(every.exposed_seconds / 8)
    assert eighth.bytes_sent == pytest.approx(every.bytes_sent / 8)
    assert every.exposed_seconds == pytest.approx(every.reduction_seconds)
    assert a_step(Plan("local", 8, delay=2)).exposed_seconds == pytest.approx(0)


def test_delayed_sgd_takes_the_longer_of_computing_and_communicating() -> None:
    assert a_step(Plan("delayed", 1, 1)).seconds == pytest.approx(0.034)
    slow = a_step(Plan("delayed", 1, 1), link=LinkCost(0.0, 1e-8, 0.0))
    assert slow.seconds == pytest.approx(2 * 3 / 4 * ((10 << 20) + FLAGS) * 1e-8, rel=1e-3)


def test_a_codec_sends_less_and_costs_computing() -> None:
    half = Codec("fp16", 0.5, 1e-10, "two phases")
    link = LinkCost(0.0, 1e-8, 0.0)
    plain, coded = (a_step(Plan("local", codec=codec), link=link) for codec in (Codec(), half))
    assert coded.bytes_sent == pytest.approx(plain.bytes_sent / 2, rel=1e-3)
    spent = 1e-10 * (10 << 20)
    assert coded.exposed_seconds == pytest.approx(plain.exposed_seconds / 2 + spent, rel=1e-3)
    gathered = a_step(Plan("local", codec=Codec("top-k", 0.5, 0.0, "gather")), link=link)
    assert gathered.bytes_sent == pytest.approx(3 * 0.5 * (10 << 20))


def test_quantised_signals_take_a_message_to_every_rank_and_a_ring() -> None:
    latency, rate = LinkCost(1e-3, 0.0, 0.0), LinkCost(0.0, 1e-8, 0.0)
    for ranks, messages in ((2, 1), (8, 2 * 7), (1024, 2 * 1023)):
        assert Reductions(Network(latency)).two_phases(ranks, 1e6).seconds == pytest.approx(1e-3 * messages)
    for ranks, share in ((2, 1), (8, 2 * 7 / 8)):
        found = Reductions(Network(rate)).two_phases(ranks, 1e6)
        assert found.seconds == pytest.approx(1e-8 * share * 1e6)
        assert found.bytes_sent == pytest.approx(share * 1e6)
    # To all others, that is out of the node for all of its ranks at once; around the ring for one of them.
    nodes = Reductions(Network(LinkCost(0.0, 1e-12, 0.0), rate, 4)).two_phases(8, 1e6)
    assert nodes.seconds == pytest.approx(1e-8 * 7 / 8 * 1e6 * (4 + 1))


def test_local_sgd_averages_buckets_of_one_size() -> None:
    compute = a_compute()
    sizes = Plan("local", bucket_mb=5.0, first_bucket_mb=1.0), Plan(bucket_mb=5.0, first_bucket_mb=1.0)
    local, sync = (step_time(compute, 4, Reductions(Network(LINK), "ring"), plan) for plan in sizes)
    assert local.buckets < sync.buckets
    assert local.bytes_sent == pytest.approx(2 * 3 / 4 * compute.total_bytes, rel=1e-6)


def test_hooks_delay_the_backward_pass() -> None:
    free = Reductions(Network(FREE))
    step = step_time(a_compute(), 2, free, Plan(), handling=Handling(1e-3))
    assert step.seconds == pytest.approx(0.034 + 4e-3)


def test_copying_delays_the_backward_pass_and_handing_over_the_reductions() -> None:
    free, compute = Reductions(Network(FREE)), a_compute()
    copied = step_time(compute, 2, free, Plan(), handling=Handling(seconds_per_byte=1e-9))
    assert copied.seconds == pytest.approx(0.034 + 1e-9 * compute.total_bytes)
    handed = step_time(compute, 2, free, Plan(), handling=Handling(bucket_seconds=0.05))
    # Each longer than the backward pass: they follow one another from the first bucket on.
    assert handed.buckets > 1
    assert handed.seconds > 0.05 * handed.buckets


@pytest.mark.parametrize("true", [Handling(1e-5), Handling(1e-5, 3e-10), Handling(1e-5, 3e-10, 4e-4)])
def test_the_prices_of_handing_over_are_found_from_steps(true: Handling) -> None:
    computes = [a_compute(), replace(a_compute(), forward_seconds=0.001, backward_seconds=0.002)]
    computes += [replace(each, parameter_bytes=tuple(4 * size for size in each.parameter_bytes)) for each in computes]
    link = Reductions(Network(LinkCost(1e-5, 1e-10, 0.0)))

    def predictor(compute: Compute) -> Callable[[Handling], float]:
        return lambda handling: step_time(compute, 2, link, Plan(), handling=handling).seconds

    predict = [predictor(compute) for compute in computes]
    found = fit_handling(true.hook_seconds, predict, [each(true) for each in predict])
    assert [each(found) for each in predict] == pytest.approx([each(true) for each in predict], rel=0.01)
    assert fit_handling(1e-5, [], []) == Handling(1e-5)


def test_exponential_stragglers_follow_the_harmonic_numbers() -> None:
    for ranks in (2, 16, 1000):
        harmonic = sum(1 / k for k in range(1, ranks + 1))
        assert Stragglers("exponential", 0.2).slowest(ranks) == pytest.approx(0.8 + 0.2 * harmonic, rel=1e-4)


@pytest.mark.parametrize(("ranks", "of_a_normal"), [(2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))])
def test_narrow_lognormal_stragglers_are_normal_order_statistics(ranks: int, of_a_normal: float) -> None:
    assert Stragglers("lognormal", 1e-3).slowest(ranks) == pytest.approx(1 + 1e-3 * of_a_normal, abs=2e-6)


def test_the_slowest_of_sums_agrees_with_drawing_them() -> None:
    generator = np.random.default_rng(0)
    drawn = 0.7 + 0.3 * generator.exponential(size=(20_000, 16, 8)).mean(axis=2).max(axis=1).mean()
    assert Stragglers("exponential", 0.3).slowest(16, 8) == pytest.approx(drawn, rel=0.01)
    assert Stragglers("exponential", 0.3).slowest(16, 8) < Stragglers("exponential", 0.3).slowest(16)
    assert Stragglers("lognormal", 0.3).slowest(1) == 1


@pytest.mark.parametrize("truth", [Stragglers("lognormal", 0.25), Stragglers("exponential", 0.25)])
def test_the_fit_finds_the_distribution(truth: Stragglers) -> None:
    generator = np.random.default_rng(1)
    values = {
        "lognormal": np.exp(0.25 * generator.standard_normal(5000)),
        "exponential": 0.75 + 0.25 * generator.exponential(size=5000),
    }[truth.kind]
    fitted = fit_stragglers(values.tolist())
    assert fitted.kind == truth.kind
    assert fitted.spread == pytest.approx(0.25, rel=0.05)


def test_steps_that_are_all_alike_have_no_stragglers() -> None:
    assert fit_stragglers([1.0, 1.0, 1.0]) == NO_STRAGGLERS
    assert fit_stragglers([1.0]) == NO_STRAGGLERS


@pytest.mark.parametrize("name", ALL_REDUCE)
def test_beyond_the_budget_closed_forms_continue_the_simulation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, between = LinkCost(2e-6, 1e-10, 1e-10), LinkCost(30e-6, 1e-9, 1e-10)
    n_bytes, around = 32 << 20, ("ring", "segmented-ring", "chain")
    for network in (Network(LINK), Network(inside, between, 4), Network(inside, between, 4, 2, "round_robin")):
        simulated = Reductions(network, name).all_reduce(16, n_bytes)
        assert simulated.method == "simulated"
        monkeypatch.setattr(reductions_module, "SIMULATED_EVENTS", 0)
        closed = Reductions(network, name).all_reduce(16, n_bytes)
        monkeypatch.undo()
        assert closed.method == "closed form"
        # At the slowest price for every hop the closed form may be too long, never much too short; the longest where
        # it has all ranks of a node share an interface in all rounds, which they do in some.
        longest = 1.02 if network.ranks_per_node is None else 1.35 if name in around else 5
        assert 0.98 < closed.seconds / simulated.seconds < longest


def test_the_cheapest_schedule_is_taken_and_two_levels_where_nodes_are_full() -> None:
    network = Network(LinkCost(1e-6, 1e-11, 0.0), LinkCost(30e-6, 1e-9, 0.0), 8)
    cheapest = Reductions(network)
    assert cheapest.all_reduce(24, 8 << 20).algorithm == "two-level"
    assert cheapest.all_reduce(20, 8 << 20).algorithm != "two-level"
    for name in ("ring", "halving-doubling", "recursive-doubling", "tree"):
        assert cheapest.all_reduce(64, 8 << 20).seconds <= Reductions(network, name).all_reduce(64, 8 << 20).seconds
    assert Reductions(Network(LINK), "auto").all_reduce(4, 1000).algorithm == "halving-doubling"
    assert Reductions(Network(LINK), "auto").all_reduce(4, 8 << 20).algorithm == "segmented-ring"


def test_measured_reductions_through_memory_are_interpolated() -> None:
    shared = {2: ((1 << 10, 1e-5), (1 << 20, 1e-3))}
    found = Reductions(Network(LINK), "auto", shared_seconds=shared)
    assert found.all_reduce(2, 1 << 20).seconds == pytest.approx(1e-3)
    assert found.all_reduce(2, 1 << 22).seconds == pytest.approx(4e-3)
    assert found.all_reduce(2, 1 << 10).method == "measured"
    assert found.all_reduce(4, 1 << 10).method == "simulated"


def test_computing_of_other_batches_is_fixed_and_per_sample() -> None:
    measured = [a_compute(batch=32), a_compute(batch=64)]
    at_128 = compute_at(measured, "mlp512", 128)
    # The optimizer's 4 ms do not depend on the batch.
    assert at_128.seconds == pytest.approx(0.004 + 4 * 0.030)
    assert at_128.arrival_seconds == pytest.approx([4 * each for each in (0.020, 0.016, 0.011, 0.005)])
    assert compute_at(measured, "mlp512", 48).forward_seconds == pytest.approx(0.015)
    with pytest.raises(ConfigError, match="no measurements of cnn; it has mlp512"):
        compute_at(measured, "cnn", 8)


def test_computing_of_other_widths_follows_multiplications_and_weights() -> None:
    def mlp(width: int, batch: int) -> Compute:
        sizes = tuple(one.nbytes for one in workload(f"mlp{width}-b{batch}").build().parameters())
        total = sum(sizes)
        forward = 1e-4 + 1e-11 * batch * total + 1e-10 * total
        arrivals = tuple(2 * forward * (len(sizes) - index) / len(sizes) for index in range(len(sizes)))
        return Compute(f"mlp{width}-b{batch}", batch, sizes, forward, 2 * forward, 2e-10 * total, arrivals, 1.2)

    fitted = [mlp(width, batch) for width, batch in ((64, 8), (64, 128), (256, 32), (512, 8), (512, 128))]
    truth = mlp(384, 64)
    found = compute_like(fitted, "mlp384-b64", truth.parameter_bytes)
    assert found.seconds == pytest.approx(truth.seconds, rel=1e-6)
    assert found.arrival_seconds == pytest.approx(truth.arrival_seconds)
    with pytest.raises(ConfigError, match="3 other mlps"):
        compute_like(fitted[:2], "mlp384-b64", truth.parameter_bytes)
    with pytest.raises(ConfigError, match="cnn-b64 cannot be modelled: it takes two other batch sizes of cnn"):
        compute_like(fitted, "cnn-b64", (4,))


@pytest.mark.parametrize("name", ["mlp0-b4", "mlp12", "resnet-b4", "cnn-b0"])
def test_unknown_workloads_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown workload"):
        workload(name)


def a_profile(computes: Sequence[Compute] = (a_compute(batch=32), a_compute(batch=64))) -> Profile:
    link = LinkBySize((4096,), (LINK, replace(LINK, alpha_seconds=40e-6)))
    return Profile(tuple(computes), link, 5e-6, ranks=2, cores=2, stragglers=Stragglers("lognormal", 0.05))


def test_a_profile_comes_back_from_its_rows(tmp_path: Path) -> None:
    profile = replace(a_profile(), shared_seconds=((4, 1e-6),), codec_seconds_per_byte=(("fp16", 1e-10),), duplex=False)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"rows": [*profile.rows(), {"kind": "validation"}]}))
    assert read_profile("--profile", file) == profile


def a_predictor(accuracy: Accuracy | None, link: LinkCost = LINK) -> Predictor:
    return Predictor(a_profile(), "mlp512", Reductions(Network(link)), "a network", NO_STRAGGLERS, accuracy)


def test_with_a_free_network_weak_scaling_is_ideal_but_accuracy_stops_at_the_limit_of_the_hyperbola() -> None:
    predictor = a_predictor(Accuracy(100, 256, "given"), FREE)
    rows = list(predictor.table((1, 4, 1024), Plan(), "weak", 64))
    assert [row["scaling_efficiency"] for row in rows] == pytest.approx([1, 1, 1])
    first, _, last = rows
    # S_min (1 + B_crit / B) steps, however many ranks: at most 1 + B_crit / B times fewer than with batch B.
    assert first["steps_to_target"] == pytest.approx(100 * (1 + 256 / 64))
    assert last["seconds_to_target"] == pytest.approx(100 * (1 + 256 / 65536) * last["step_seconds"])
    assert first["seconds_to_target"] / last["seconds_to_target"] == pytest.approx(5 / (1 + 256 / 65536))
    for row in rows:
        product = row["hardware_efficiency"] * row["statistical_efficiency"]
        assert row["speed_up_to_accuracy"] == pytest.approx(product)


def test_strong_scaling_keeps_the_batch_and_leaves_out_ranks_without_a_sample() -> None:
    rows = list(a_predictor(None).table((1, 2, 64, 128), Plan(), "strong", 64))
    assert [row["ranks"] for row in rows] == [1, 2, 64]
    assert {row["global_batch"] for row in rows} == {64}
    assert all(row["simulated"] for row in rows)
    assert "seconds_to_target" not in rows[0]


def test_measured_steps_of_another_method_count_and_misses_are_infinite() -> None:
    known = {(Method("local", 8), 4, 128): 777.0, (Method("local", 8), 8, 256): math.inf}
    accuracy = Accuracy(100, 256, "given", known)
    assert accuracy.steps(Method("local", 8), 4, 128).count == 777
    assert accuracy.steps(Method("local", 4), 4, 128).basis == "assumed"
    assert accuracy.steps(Method("local", 8, codec="sign"), 4, 128).basis == "assumed"
    assert accuracy.steps(Method(codec="sign"), 4, 128).basis == "assumed"
    row = a_predictor(accuracy).row(8, 32, Plan("local", 8), 32)
    assert row["seconds_to_target"] is None
    assert row["steps_basis"] == "measured"


def test_ranks_and_the_one_rank_they_are_compared_with_stand_on_one_curve() -> None:
    # A lucky median of a few runs, beside a curve for one rank, would be taken for a speed-up.
    lucky = {(SYNCHRONOUS, 2, 256): 100.0}
    rows = [a_predictor(Accuracy(100, 256, "given", known), FREE).row(2, 128, Plan(), 256) for known in ({}, lucky)]
    assert rows[0]["steps_to_target"] == rows[1]["steps_to_target"] == 200
    predictor = a_predictor(Accuracy(100, 256, "given", lucky))
    baseline = predictor.baseline()
    assert baseline is not None
    alone = predictor.row(1, baseline.batch_size, Plan(), baseline.batch_size)
    assert alone["speed_up_to_accuracy"] == pytest.approx(1)
    assert alone["statistical_efficiency"] == pytest.approx(1)


def test_what_a_fit_leaves_open_comes_with_the_steps() -> None:
    generator = np.random.default_rng(0)
    points = [
        (batch, 100 * (1 + 256 / batch) * float(np.exp(0.1 * generator.standard_normal())))
        for batch in (32, 128, 512)
        for _ in range(5)
    ]
    fit = fit_hyperbola(points)
    accuracy = Accuracy(fit.s_min, fit.b_crit, "fitted", fit=fit)
    within, beyond = (accuracy.steps(SYNCHRONOUS, 2, batch) for batch in (128, 4096))
    assert within.low < within.count < within.high
    assert (within.beyond, beyond.beyond) == (False, True)
    row = a_predictor(accuracy).row(2, 2048, Plan(), 4096)
    low, high = row["seconds_to_target_range"]
    assert low < row["seconds_to_target"] < high
    assert row["beyond_study"]


def test_16384_ranks_are_predicted() -> None:
    network = Network(LINK, LinkCost(25e-6, 3e-10, 2e-10), 8)
    predictor = Predictor(a_profile(), "mlp512", Reductions(network), "nodes of 8", Stragglers("lognormal", 0.05), None)
    (row,) = predictor.table((16384,), Plan(), "weak", 64)
    assert 0 < row["scaling_efficiency"] < 1
    assert set(row["reduction_methods"]) <= {"simulated", "closed form"}
