"""Spans of time of several ranks as a Chrome trace: a file for ui.perfetto.dev or chrome://tracing.

Every rank is a process. What its training thread does is one row, where one span lies within another. A collective is
a row of its own, from launch to end, and in it "queued" (those launched before come first) and "busy" (from when its
turn came).

The format: "Trace Event Format", Google, in the docs of the Catapult project; complete events (X) and nestable
asynchronous ones (b, e), times in µs. `otherData` has each clock's offset from rank 0's, and how uncertain it is.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from allreduce_sgd.comm.clock import ClockOffset
from allreduce_sgd.durable import replace_file
from allreduce_sgd.errors import ConfigError

__all__ = ["RankTrace", "Span", "check_trace_file", "chrome_trace", "write_trace"]

_GAP_NS = 1_000_000
_TRAINING_ROW = 0


@dataclass(frozen=True)
class Span:
    """Something that took from `start_seconds` to `end_seconds`; `turn_seconds` is when a collective's turn came."""

    name: str
    start_seconds: float
    end_seconds: float
    turn_seconds: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankTrace:
    """What one rank did, by its own clock."""

    host: str
    clock: ClockOffset
    spans: Sequence[Span]


def check_trace_file(path: Path) -> None:
    """Raise ConfigError where no file can be written there."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--trace {path}: name a file in a folder that exists")


def chrome_trace(steps: Sequence[tuple[str, Sequence[RankTrace]]]) -> dict[str, Any]:
    """Return the trace of steps with a title each, laid out one after another."""
    events: list[dict[str, Any]] = []
    clocks = []
    for rank, trace in enumerate(steps[0][1] if steps else ()):
        row = {"ph": "M", "pid": rank, "tid": _TRAINING_ROW}
        events.append({**row, "name": "process_name", "args": {"name": f"rank {rank} on {trace.host}"}})
        events.append({**row, "name": "process_sort_index", "args": {"sort_index": rank}})
        events.append({**row, "name": "thread_name", "args": {"name": "training"}})
    position_ns = 0
    for number, (title, traces) in enumerate(steps):
        origin = min(span.start_seconds - trace.clock.seconds for trace in traces for span in trace.spans)
        latest_ns = position_ns
        for rank, trace in enumerate(traces):
            clocks.append({"step": title, "rank": rank, "host": trace.host, **asdict(trace.clock)})
            axis = _Axis(origin + trace.clock.seconds, position_ns)
            for index, span in enumerate(trace.spans):
                events += _events(span, axis, rank, f"{number}.{rank}.{index}", title)
                latest_ns = max(latest_ns, axis.ns(span.end_seconds))
        position_ns = latest_ns + _GAP_NS
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"clock": "time.perf_counter of rank 0; others less their offset", "offsets": clocks},
    }


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """Write what `chrome_trace` returned."""
    replace_file(path, json.dumps(trace, allow_nan=False) + "\n")


@dataclass(frozen=True)
class _Axis:
    origin_seconds: float
    position_ns: int

    def ns(self, seconds: float) -> int:
        return self.position_ns + round(1e9 * (seconds - self.origin_seconds))


def _events(span: Span, axis: _Axis, rank: int, identity: str, title: str) -> list[dict[str, Any]]:
    start_ns, end_ns = axis.ns(span.start_seconds), axis.ns(span.end_seconds)
    row = {"pid": rank, "tid": _TRAINING_ROW}
    if span.turn_seconds is None:
        arguments = {"title": title} if span.name == "step" else span.arguments
        times = {"ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3}
        return [{"ph": "X", "cat": "training", "name": span.name, **times, **row, "args": arguments}]
    turn_ns = min(max(start_ns, axis.ns(span.turn_seconds)), end_ns)

    def event(kind: str, name: str, at_ns: int) -> dict[str, Any]:
        return {"ph": kind, "cat": "communication", "name": name, "ts": at_ns / 1e3, "id": identity, **row}

    return [
        {**event("b", span.name, start_ns), "args": span.arguments},
        event("b", "queued", start_ns),
        event("e", "queued", turn_ns),
        event("b", "busy", turn_ns),
        event("e", "busy", end_ns),
        event("e", span.name, end_ns),
    ]
