"""The timeline of a step: what it shows of one rank, that the format is sound, and the trace of two ranks."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.chrome_trace import RankTrace, Span, chrome_trace, write_trace
from allreduce_sgd.comm.base import Work
from allreduce_sgd.comm.clock import ClockOffset
from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.gradients.ddp import DistributedDataParallel
from allreduce_sgd.trace import StepRecorder, gather_trace
from benchmarks.workloads import WORKLOADS
from tests.warm_start import mpirun, python

Event = Mapping[str, Any]
PHASES = {"forward", "backward", "optimizer"}
# A nanosecond, the unit of rounding, in microseconds.
ROUNDING = 0.0011


def trained(accumulate: int = 1) -> list[Span]:
    """Record one step of one rank, which reduces something within the backward pass."""
    first = nn.Linear(3, 4)
    module = nn.Sequential(first, nn.Linear(4, 2))
    comm = SingleCommunicator()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    replica = DistributedDataParallel(module, comm)
    first.weight.register_post_accumulate_grad_hook(lambda parameter: reduce_late(comm, parameter))
    recorder = StepRecorder(replica, optimizer, comm)
    for recorded in (False, True):
        if recorded:
            with recorder.recording():
                step(replica, optimizer, accumulate)
        else:
            step(replica, optimizer, accumulate)
    assert "all_reduce" not in vars(comm)
    return list(gather_trace(recorder, comm)[0].spans)


def step(replica: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int) -> None:
    optimizer.zero_grad()
    for _ in range(accumulate):
        replica(torch.ones(5, 3)).sum().backward()
    optimizer.step()


class Late:
    """A work that takes 5 ms, as if it had been queued for 1 ms."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.started_seconds = time.perf_counter() + 0.001
        self.ended_seconds: float | None = None

    def wait(self, timeout: float | None = None) -> Tensor:
        time.sleep(0.005)
        self.ended_seconds = time.perf_counter()
        return self.buffer

    def done(self) -> bool:
        return self.ended_seconds is not None


def reduce_late(comm: SingleCommunicator, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    comm.all_reduce(parameter.grad).wait()


def named(spans: Iterable[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def test_phases_of_a_step_follow_one_another_within_it() -> None:
    spans = trained()
    (whole,) = named(spans, "step")
    phases = [span for span in spans if span.name in PHASES]
    assert [span.name for span in phases] == ["forward", "backward", "optimizer"]
    edges = [edge for span in phases for edge in (span.start_seconds, span.end_seconds)]
    assert [whole.start_seconds, *edges, whole.end_seconds] == sorted([whole.start_seconds, *edges, whole.end_seconds])


def test_every_pass_of_an_accumulated_step_is_shown() -> None:
    spans = trained(accumulate=3)
    assert Counter(span.name for span in spans if span.name in PHASES) == {"forward": 3, "backward": 3, "optimizer": 1}


def test_what_is_launched_is_shown_with_its_bytes_and_finished_work_is_no_waiting() -> None:
    spans = trained()
    (reduction,) = named(spans, "all_reduce 0")
    (backward,) = named(spans, "backward")
    assert reduction.arguments == {"bytes": 4 * 12, "dtype": "float32", "algorithm": None}
    assert backward.start_seconds < reduction.start_seconds <= reduction.end_seconds < backward.end_seconds
    assert named(spans, "waiting") == []


def test_waiting_queueing_and_being_busy_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(self: SingleCommunicator, buffer: Tensor) -> Work:
        return Late(buffer)

    monkeypatch.setattr(SingleCommunicator, "all_reduce", all_reduce)
    spans = trained()
    (reduction,), (waiting,), (backward,) = (named(spans, name) for name in ("all_reduce 0", "waiting", "backward"))
    assert waiting.arguments == {"for": "all_reduce 0"}
    assert waiting.end_seconds - waiting.start_seconds >= 0.005
    assert backward.start_seconds < waiting.start_seconds < waiting.end_seconds < backward.end_seconds
    assert reduction.turn_seconds is not None
    assert 0.001 <= reduction.turn_seconds - reduction.start_seconds < 0.0015
    assert reduction.start_seconds + 0.005 <= reduction.end_seconds <= waiting.end_seconds


def test_a_step_that_raises_is_not_recorded_any_longer() -> None:
    comm, module = SingleCommunicator(), nn.Linear(2, 2)
    recorder = StepRecorder(module, torch.optim.SGD(module.parameters(), lr=0.1), comm)

    def fail() -> None:
        with recorder.recording():
            comm.all_reduce(torch.ones(2)).wait()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    module(torch.ones(1, 2)).sum().backward()
    comm.all_reduce(torch.ones(2)).wait()
    assert "all_reduce" not in vars(comm)
    assert [span.name for span in recorder.spans()] == ["all_reduce 0"]


def test_clocks_are_laid_on_one_axis_and_steps_one_after_another() -> None:
    """Rank 1's clock is 1000 s ahead of rank 0's; its step began 2 ms later and ended with the other."""
    zero = RankTrace("a", ClockOffset(0.0, 0.0), [Span("step", 5.0, 5.01), Span("all_reduce 0", 5.002, 5.009, 5.004)])
    one = RankTrace("b", ClockOffset(1000.0, 1e-5), [Span("step", 1005.002, 1005.01)])
    trace = chrome_trace([("first", [zero, one]), ("second", [zero, one])])
    steps = [event for event in trace["traceEvents"] if event["name"] == "step"]
    assert [event["ts"] for event in steps] == pytest.approx([0, 2000, 11000, 13000], abs=0.01)
    assert [event["dur"] for event in steps] == pytest.approx([10000, 8000, 10000, 8000], abs=0.01)
    assert [event["args"]["title"] for event in steps] == ["first", "first", "second", "second"]
    assert [event["ts"] for event in trace["traceEvents"] if event["name"] == "busy"][:2] == pytest.approx([4000, 9000])
    told = trace["otherData"]["offsets"][1]
    assert (told["rank"], told["host"], told["seconds"], told["uncertainty_seconds"]) == (1, "b", 1000.0, 1e-5)
    assert_sound(trace)


def test_the_file_is_json(tmp_path: Path) -> None:
    trace = chrome_trace([("one", [RankTrace("a", ClockOffset(0.0, 0.0), trained())])])
    write_trace(tmp_path / "trace.json", trace)
    assert json.loads((tmp_path / "trace.json").read_text()) == trace
    assert_sound(trace)


def test_two_ranks_of_a_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    flags = "--workloads mlp512-b16,cnn-b64 --settings ddp --rounds 1 --steps 2 --warmup 1"
    run = mpirun(2, ["-m", "benchmarks.step_time", *flags.split(), "--trace", str(file)])
    assert run.status == 0, run.errors
    trace = json.loads(file.read_text())
    assert_sound(trace)
    events = trace["traceEvents"]
    assert {event["args"]["name"].split(" on ")[0] for event in events if event["name"] == "process_name"} == {
        "rank 0",
        "rank 1",
    }
    steps = {(event["pid"], event["args"]["title"]): event for event in events if event["name"] == "step"}
    titles = ["mlp512-b16, allreduce_sgd ddp", "cnn-b64, allreduce_sgd ddp"]
    assert set(steps) == {(rank, title) for rank in (0, 1) for title in titles}
    for title, workload in zip(titles, ("mlp512-b16", "cnn-b64"), strict=True):
        gradient_bytes = 4 * sum(parameter.numel() for parameter in WORKLOADS[workload].build().parameters())
        for rank in (0, 1):
            whole = steps[rank, title]
            within = [event for event in events if event["pid"] == rank and lies_in(event, whole)]
            phases = Counter(event["name"] for event in within if event["name"] in PHASES)
            assert phases == {"forward": 1, "backward": 1, "optimizer": 1}
            launched = [event for event in within if event["ph"] == "b" and event["name"].startswith("all_reduce")]
            # Every bucket once, and all of them are all gradients and a flag for every parameter, and one more.
            assert [event["name"] for event in launched] == [f"all_reduce {index}" for index in range(len(launched))]
            assert 0 < sum(event["args"]["bytes"] for event in launched) - gradient_bytes < 200
            assert all(event["args"]["algorithm"] for event in launched)
        # On a common clock neither rank is done with reducing before the other has begun.
        spans = [interval(events, f"{titles.index(title)}.{rank}.", "all_reduce 0") for rank in (0, 1)]
        assert max(start for start, _ in spans) < min(end for _, end in spans)


@pytest.mark.parametrize("strategy", ["sync", "local"])
def test_a_training_writes_one_of_its_steps(strategy: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    flags = f"--steps 20 --strategy {strategy} --no-shard-optimizer --trace {file} --output {tmp_path / 'run'}"
    if strategy == "local":
        flags += " --period 4"
    run = mpirun(2, ["-m", "allreduce_sgd.train", *flags.split()])
    assert run.status == 0, run.errors
    trace = json.loads(file.read_text())
    assert_sound(trace)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for rank in (0, 1):
        names = [event["name"] for event in events if event["pid"] == rank and event["name"] != "waiting"]
        assert names == ["step", "forward", "backward", "optimizer"]
    assert [event["args"] for event in events if event["name"] == "step"] == 2 * [{"title": "step 8"}]
    # Either strategy exchanges something in this step.
    assert any(event["name"] == "all_reduce 0" for event in trace["traceEvents"])


def test_a_training_refuses_a_trace_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    run = python(["-m", "allreduce_sgd.train", "--trace", str(tmp_path / "no" / "trace.json")], cwd=tmp_path)
    assert run.status == 2
    assert run.errors.count("\n") == 1
    assert "--trace" in run.errors
    assert list(tmp_path.iterdir()) == []


def interval(events: Sequence[Event], identity: str, name: str) -> tuple[float, float]:
    edges = [event["ts"] for event in events if event["name"] == name and str(event.get("id", "")).startswith(identity)]
    assert len(edges) == 2
    return edges[0], edges[1]


def lies_in(event: Event, whole: Event) -> bool:
    return "ts" in event and whole["ts"] <= event["ts"] <= whole["ts"] + whole["dur"]


def assert_sound(trace: Mapping[str, Any]) -> None:
    """Complete events of one row nest, and each asynchronous one ends, what began last ending first."""
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} <= {"M", "X", "b", "e"}
    assert all(event["ts"] >= 0 for event in events if event["ph"] != "M")
    rows: dict[int, list[Event]] = {}
    for event in events:
        if event["ph"] == "X":
            rows.setdefault(event["pid"], []).append(event)
    for row in rows.values():
        ends: list[float] = []
        for event in sorted(row, key=lambda event: (event["ts"], -event["dur"])):
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            assert event["dur"] >= 0
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + ROUNDING
            ends.append(event["ts"] + event["dur"])
    begun: dict[str, list[Event]] = {}
    for event in events:
        if event["ph"] == "b":
            begun.setdefault(event["id"], []).append(event)
        elif event["ph"] == "e":
            begin = begun[event["id"]].pop()
            assert (begin["name"], begin["cat"], begin["pid"]) == (event["name"], event["cat"], event["pid"])
            assert begin["ts"] <= event["ts"]
    assert not any(begun.values())
