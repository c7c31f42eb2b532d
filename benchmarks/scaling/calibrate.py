"""Steps on the very network of a profile: predicted, and used to find what only shows in steps as a whole."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from allreduce_sgd.schedules.simulate import Network
from benchmarks.scaling.handling import Handling, fit_handling
from benchmarks.scaling.profile import Compute, Profile
from benchmarks.scaling.reductions import Reductions
from benchmarks.scaling.step_probe import Measured
from benchmarks.scaling.stepping import Plan, step_time

__all__ = ["calibrated", "predicted_step"]


def predicted_step(profile: Profile, compute: Compute, ranks: int, hosts: int) -> float:
    """Return the seconds of a synchronous step of so many ranks, on the profile's network."""
    shared = {}
    if hosts == 1 and profile.hosts == 1 and profile.shared_seconds and profile.ranks > 1:
        # Each rank moves 2(P-1)/P of the bytes.
        scale = (1 - 1 / ranks) / (1 - 1 / profile.ranks)
        shared = {ranks: tuple((n_bytes, scale * seconds) for n_bytes, seconds in profile.shared_seconds)}
    network = Network(profile.link, duplex=profile.duplex)
    reductions = Reductions(network, "auto", profile.call_seconds, shared)
    return step_time(compute, ranks, reductions, Plan(), profile.stragglers, profile.handling).seconds


def calibrated(profile: Profile, measured: Mapping[str, Measured]) -> Profile:
    """Return the profile with the prices of handing over that explain the steps measured of its own workloads.

    Steps of one rank, which hands nothing over, and of other workloads are left out.
    """
    cases = [
        (compute, measured[compute.workload])
        for compute in profile.computes
        if compute.workload in measured and measured[compute.workload].ranks == profile.ranks > 1
    ]

    def predictor(compute: Compute) -> Callable[[Handling], float]:
        return lambda handling: predicted_step(
            replace(profile, handling=handling), compute, profile.ranks, profile.hosts
        )

    handling = fit_handling(
        profile.handling.hook_seconds,
        [predictor(compute) for compute, _ in cases],
        [step.median_seconds for _, step in cases],
    )
    return replace(profile, handling=handling)
