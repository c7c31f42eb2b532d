"""The rows of the simulation benchmark: what was measured beside what is predicted, and what is simulated."""

import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from allreduce_sgd.comm.choice import TWO_LEVEL
from allreduce_sgd.schedules.simulate import LinkBySize, Network, multi_lane, simulate
from allreduce_sgd.schedules.step import Columnar
from benchmarks.cost_fit import fit_link, oversubscription_factor, predict, profile
from benchmarks.cost_measurement import DTYPE, Timing

__all__ = ["Rows", "compare", "simulated_rows"]

Rows = list[dict[str, Any]]


def compare(
    timings: Sequence[Timing],
    programs: Mapping[str, Columnar],
    gamma_seconds_per_byte: Mapping[int, float],
    cores: int,
    regimes: int,
    duplex: bool,
) -> tuple[Rows, LinkBySize]:
    """Fit, predict, and return a row for each regime of the link and for each timing, and the link.

    Of every algorithm and number of ranks, the sizes alternate between fitted (the first one is) and held out. Timings
    of empty buffers say what a call costs.
    """
    empty = [each.measurement for each in timings if each.n_bytes == 0]
    timings = sorted((each for each in timings if each.n_bytes > 0), key=lambda each: (*_group(each), each.n_bytes))
    groups = {key: list(group) for key, group in itertools.groupby(timings, _group)}
    fitted = {id(each) for group in groups.values() for each in group[::2]}
    numbers = sorted({each.measurement.ranks for each in timings})
    base = max((ranks for ranks in numbers if ranks <= cores), default=numbers[0])
    basis = [each.measurement for each in timings if id(each) in fitted and each.measurement.ranks == base]
    call_seconds = statistics.median(each.seconds for each in empty if each.ranks == base)
    profiles = [profile(programs[each.algorithm], each, duplex) for each in basis]
    link = fit_link(basis, profiles, gamma_seconds_per_byte, call_seconds, regimes)
    single = fit_link(basis, profiles, gamma_seconds_per_byte, call_seconds, 1)

    def expect(timing: Timing, wanted: LinkBySize) -> float:
        measured = timing.measurement
        return call_seconds + predict(programs[measured.algorithm], measured, Network(wanted, duplex=duplex))

    expected = {id(each): expect(each, link) for each in timings}
    factors = {}
    for ranks in (ranks for ranks in numbers if ranks > max(base, cores)):
        learnt = [each for each in timings if id(each) in fitted and each.measurement.ranks == ranks]
        factors[ranks] = oversubscription_factor(
            [each.measurement.seconds for each in learnt], [expected[id(each)] for each in learnt]
        )
    rows = _link_rows(link, call_seconds)
    for each in timings:
        measured = each.measurement
        factor = factors.get(measured.ranks)
        scale = 1.0 if factor is None else factor
        rows.append(
            {
                "kind": "measured",
                "algorithm": measured.algorithm,
                "ranks": measured.ranks,
                "cores": cores,
                "bytes": each.n_bytes,
                "fitted": id(each) in fitted and (measured.ranks == base or factor is not None),
                "median_seconds": measured.seconds,
                "minimum_seconds": each.minimum_seconds,
                "maximum_seconds": each.maximum_seconds,
                "predicted_seconds": expected[id(each)],
                "oversubscription": factor,
                "error": expected[id(each)] * scale / measured.seconds - 1,
                "one_regime_error": expect(each, single) / measured.seconds - 1 if factor is None else None,
            }
        )
    return rows, link


def simulated_rows(
    programs: Mapping[str, Columnar], numbers: Sequence[int], sizes_bytes: Sequence[int], network: Network
) -> Rows:
    """Return a row for each algorithm, size and number of ranks; two-level is added where these fill several nodes."""
    rows: Rows = []
    per_node = network.ranks_per_node
    silent = not sys.stderr.isatty()
    cases = list(itertools.product(sizes_bytes, numbers))
    for n_bytes, ranks in tqdm(cases, desc="simulating", leave=False, disable=silent):
        field = dict(programs)
        if per_node is not None and ranks > per_node and ranks % per_node == 0:
            fastest = "ring" if "ring" in programs else next(iter(programs))
            field[TWO_LEVEL] = multi_lane(programs[fastest], network)
        for name, columns in field.items():
            result = simulate(columns, ranks, n_bytes // DTYPE.itemsize, DTYPE.itemsize, network)
            rows.append(
                {
                    "kind": "simulated",
                    "algorithm": name,
                    "ranks": ranks,
                    "bytes": n_bytes,
                    "seconds": result.seconds,
                    "rounds": result.rounds,
                    "largest_bytes_sent": int(result.bytes_sent.max()),
                    "ranks_per_node": per_node,
                    "placement": network.placement,
                }
            )
    return rows


def _group(timing: Timing) -> tuple[int, str]:
    return timing.measurement.ranks, timing.measurement.algorithm


def _link_rows(link: LinkBySize, call_seconds: float) -> Rows:
    rows: Rows = []
    for index, cost in enumerate(link.costs):
        limit_bytes = link.limits_bytes[index] if index < len(link.limits_bytes) else None
        rows.append({"kind": "link", "largest_message_bytes": limit_bytes, "call_seconds": call_seconds, **vars(cost)})
    return rows
