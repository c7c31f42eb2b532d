"""What servers do with gradients, who serves whom, and tickets: without ranks."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allreduce_sgd.comm.single import SingleCommunicator
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.errors import ConfigError, MismatchError
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.strategies.options import StrategyOptions
from allreduce_sgd.strategies.pace import Ticket
from allreduce_sgd.strategies.server.build import check_served
from allreduce_sgd.strategies.server.roles import Role, divide, server_count
from allreduce_sgd.strategies.server.rules import Immediate, Lockstep, Push, Rule, Softsync
from allreduce_sgd.strategies.server.shards import Master, Vectors
from allreduce_sgd.strategies.server.tickets import Tickets
from allreduce_sgd.strategies.server.tree import Relay
from allreduce_sgd.strategies.server.wire import CODECS, make_wires


def memory() -> list[Tensor]:
    return [torch.zeros(2), torch.zeros(1, dtype=torch.float64)]


def put(rule: Rule, client: int, value: float) -> None:
    for part in rule.place(client):
        part.fill_(value)


def held(rule: Rule) -> float:
    values = [value for part in rule.gradient for value in part.tolist()]
    assert values == pytest.approx([values[0]] * len(values))
    return values[0]


def test_lockstep_sums_in_the_order_of_clients_whoever_comes_first() -> None:
    values = {0: 1e8, 1: -1e8, 2: 1.0}
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        rule = Lockstep([torch.zeros(1)], [0, 1, 2])
        updates = []
        for client in order:
            rule.place(client)[0].fill_(values[client])
            updates.append(rule.push(Push(client, 0.5, [7]), 7))
            pushed = order[: len(updates)] if len(updates) < 3 else [0, 1, 2]
            assert rule.missing() == [one for one in (0, 1, 2) if one not in pushed]
        assert updates[:2] == [None, None]
        assert updates[2] is not None
        assert updates[2].step
        assert updates[2].lr == 0.5
        # In float32 any order but that of the ranks gives 0.
        assert held(rule) == 1.0
        assert rule.missing() == []


def test_lockstep_without_samples_and_with_overflow() -> None:
    rule = Lockstep(memory(), [0, 1])
    put(rule, 0, 99.0)
    put(rule, 1, 3.0)
    assert rule.push(Push(0, 0.1, [0], filled=False), 0) is None
    update = rule.push(Push(1, 0.1, [0]), 0)
    assert update is not None
    assert update.step
    assert held(rule) == 3.0
    rule.push(Push(0, 0.1, [1], filled=False, finite=False), 1)
    put(rule, 1, 3.0)
    update = rule.push(Push(1, 0.1, [1]), 1)
    assert update is not None
    assert not update.step
    assert not update.finite


def test_lockstep_refuses_clients_that_are_not_in_step() -> None:
    rule = Lockstep(memory(), [0, 1])
    with pytest.raises(MismatchError, match="rank 0 pushed a gradient of version 3, the server stands at 4"):
        rule.push(Push(0, 0.1, [3]), 4)
    rule.push(Push(0, 0.1, [4]), 4)
    with pytest.raises(MismatchError, match="once for every version"):
        rule.push(Push(0, 0.1, [4]), 4)


def test_softsync_is_the_mean_of_gradients_divided_by_their_staleness() -> None:
    rule = Softsync(memory(), 3, divide=True)
    for client, (value, version) in enumerate([(1.0, 10), (4.0, 8), (12.0, 6)]):
        put(rule, client, value)
        update = rule.push(Push(client, 0.1, [version]), 10)
    assert update is not None
    assert list(update.versions) == [10, 8, 6]
    assert held(rule) == pytest.approx((1 + 4 / 2 + 12 / 4) / 3)
    assert rule.staleness == {0: 1, 2: 1, 4: 1}
    plain = Softsync(memory(), 1, divide=False)
    put(plain, 0, 8.0)
    assert plain.push(Push(0, 0.1, [2]), 10) is not None
    assert held(plain) == 8.0


def test_softsync_goes_on_from_the_middle_of_a_group() -> None:
    rule, restored = (Softsync(memory(), 2, divide=True) for _ in range(2))
    put(rule, 0, 1.0)
    assert rule.push(Push(0, 0.1, [0]), 0) is None
    restored.load_state_dict(rule.state_dict())
    for one in (rule, restored):
        put(one, 1, 5.0)
        assert one.push(Push(1, 0.1, [0]), 0) is not None
        assert held(one) == 3.0
    assert restored.staleness == rule.staleness == {0: 2}


def test_a_group_must_hold_a_gradient() -> None:
    with pytest.raises(ValueError, match="group is 0"):
        Softsync(memory(), 0, divide=True)


def round_robin(rule: Rule, workers: int, pushes: int, first_counted: int) -> int:
    """Let equal workers push and fetch in turn; return the updates from `first_counted` on."""
    version, updates = 0, 0
    fetched = [0] * workers
    for number in range(pushes):
        if number == first_counted:
            rule.staleness.clear()
            updates = 0
        client = number % workers
        put(rule, client, 1.0)
        if rule.push(Push(client, 0.1, [fetched[client]]), version) is not None:
            version += 1
            updates += 1
        fetched[client] = version
    return updates


@pytest.mark.parametrize(
    ("workers", "softsync"), [(4, 1), (4, 2), (4, 4), (6, 4), (30, 1), (30, 2), (30, 15), (30, 30)]
)
def test_mean_staleness_of_equal_workers(workers: int, softsync: int) -> None:
    group = workers // softsync
    rule = Softsync(memory(), group, divide=True)
    counted = 3 * math.lcm(workers, group)
    assert round_robin(rule, workers, counted + 2 * workers, 2 * workers) == counted // group
    assert rule.staleness.total() == counted
    mean = sum(one * count for one, count in rule.staleness.items()) / counted
    assert mean == pytest.approx((workers - 1) / group)


def quadratic(workers: int, softsync: int, divide: bool, rate: float, pushes: int) -> float:
    """The distance from the minimum of x²/2 that equal workers in turn come to, from 1."""
    rule = Softsync([torch.zeros(1, dtype=torch.float64)], workers // softsync, divide)
    x, version = 1.0, 0
    copies = [(x, version)] * workers
    for number in range(pushes):
        client = number % workers
        rule.place(client)[0].fill_(copies[client][0])
        if rule.push(Push(client, rate, [copies[client][1]]), version) is not None:
            x -= rate * float(rule.gradient[0])
            version += 1
        copies[client] = x, version
        if abs(x) > 1e6:
            break
    return abs(x)


@pytest.mark.parametrize("softsync", [15, 30])
def test_dividing_by_staleness_converges_where_the_plain_step_diverges(softsync: int) -> None:
    """Zhang et al. 2016, with 30 workers: the plain step is stable below 2 sin(π/(2(2τ+1))), 0.1 and 0.05 here."""
    assert quadratic(30, softsync, divide=False, rate=0.5, pushes=9000) > 1e6
    assert quadratic(30, softsync, divide=True, rate=0.5, pushes=9000) < 1e-3


def test_immediate_applies_each_and_counts_staleness() -> None:
    rule = Immediate(memory())
    put(rule, 0, 5.0)
    update = rule.push(Push(0, 0.2, [4]), 9)
    assert update is not None
    assert update.step
    assert held(rule) == 5.0
    assert rule.staleness == {5: 1}
    assert rule.push(Push(1, 0.2, [4], filled=False), 9) is None


def test_relay_sends_on_what_came_meanwhile_and_leaves_what_is_on_its_way() -> None:
    rule = Relay(memory())
    assert rule.due() is None
    put(rule, 0, 1.0)
    assert rule.push(Push(0, 0.1, [3]), 0) is None
    first = rule.due()
    assert first is not None
    assert list(first.versions) == [3]
    sent = list(rule.gradient)
    for client in (0, 1):
        put(rule, client, 10.0)
        rule.push(Push(client, 0.2, [client]), 0)
    assert sent[0].tolist() == [1.0, 1.0]
    second = rule.due()
    assert second is not None
    assert list(second.versions) == [0, 1]
    assert second.lr == 0.2
    assert held(rule) == 20.0
    put(rule, 0, 2.0)
    rule.push(Push(0, 0.1, [5]), 0)
    assert rule.due() is not None
    assert held(rule) == 2.0


def report(stop: bool = False) -> list[float]:
    return [1.0, 2.0, 3.0, 4.0, float(stop)]


def test_tickets_come_in_order_to_whoever_asks() -> None:
    tickets = Tickets([0, 1])
    assert tickets.take(0, report()) is None
    tickets.open(5, 7)
    assert tickets.inside == [0, 1]
    taken = [tickets.take(client, report()) for client in (0, 0, 0, 1)]
    assert taken == [Ticket(5, 0), Ticket(5, 1), Ticket(6, 0), Ticket(6, 1)]
    assert tickets.take(0, report()) is None
    assert tickets.inside == [1]
    assert tickets.take(1, report()) is None
    assert tickets.totals == [6.0, 12.0, 18.0, 24.0, 0.0]
    assert tickets.close() == 7
    assert tickets.inside == []


@pytest.mark.parametrize(("taken", "stands_at"), [(0, 5), (1, 6), (2, 6), (3, 7)])
def test_who_asks_to_stop_ends_the_stretch_with_the_step_under_way(taken: int, stands_at: int) -> None:
    tickets = Tickets([0, 1])
    tickets.open(5, 100)
    for _ in range(taken):
        tickets.take(0, report())
    left = 0
    while tickets.take(1, report(stop=left == 0)) is not None:
        left += 1
    assert (taken + left) % 2 == 0
    assert left <= 1
    assert tickets.close() == stands_at


def test_who_serves() -> None:
    assert server_count(StrategyOptions(strategy="server-sync"), 4) == 1
    assert server_count(StrategyOptions(strategy="server-async", servers=3), 4) == 3
    assert server_count(StrategyOptions(strategy="easgd", servers=1), 2) == 1
    for size, fan_out, servers in [(3, 1, 2), (4, 2, 2), (5, 1, 3), (11, 4, 3), (6, 100, 2)]:
        options = StrategyOptions(strategy="server-sync", server_tree=fan_out)
        assert server_count(options, size) == servers
        assert servers == 1 + math.ceil((size - servers) / fan_out)


@pytest.mark.parametrize(
    ("options", "size", "told"),
    [
        ({"servers": 0}, 4, "--servers 0: --strategy server-sync needs at least 1 server"),
        ({"servers": 4}, 4, "--servers 4: 4 ranks started, .* choose 1 to 3"),
        ({"servers": 7}, 4, "--servers 7: .* choose 1 to 3"),
        ({}, 1, "--strategy server-sync: 1 rank started, .* start at least 2"),
        ({"server_tree": 1}, 4, "--server-tree 1: 4 ranks cannot .* start 3 or 5"),
        ({"server_tree": 2}, 1, "--server-tree 2: 1 rank cannot .* start 3"),
        ({"server_tree": 2, "servers": 3}, 4, "--servers 3: --server-tree 2 .* a root and 1 leaf; choose --servers 2"),
        ({"server_tree": 2, "strategy": "easgd"}, 4, "--server-tree 2: --strategy easgd has no tree"),
    ],
)
def test_what_cannot_be_divided_is_refused(options: dict[str, object], size: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        server_count(StrategyOptions(**{"strategy": "server-sync", **options}), size)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_a_rank_alone_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match="start at least 2"):
        divide(SingleCommunicator(), StrategyOptions(strategy="server-async"))


def roles(size: int, servers: int, fan_out: int | None) -> list[Role]:
    found = []
    for rank in range(size):
        world = SingleCommunicator()
        world.rank, world.size = rank, size
        found.append(Role(world, SingleCommunicator(), servers, fan_out))
    return found


@pytest.mark.parametrize(("size", "servers", "fan_out"), [(4, 1, None), (7, 3, None), (4, 2, 2), (8, 3, 3), (5, 3, 1)])
def test_workers_ask_those_who_have_them_as_clients(size: int, servers: int, fan_out: int | None) -> None:
    everyone = roles(size, servers, fan_out)
    workers = [role for role in everyone if not role.serves]
    assert [role.world.rank for role in workers] == list(range(size - servers))
    for role in everyone:
        if role.serves:
            expected = [one.world.rank for one in workers if role.world.rank in one.sources]
            if fan_out is not None:
                assert role.is_leaf == (role.world.rank > role.workers)
                expected = expected if role.is_leaf else list(range(role.workers + 1, size))
                assert role.is_leaf is False or 1 <= len(role.clients) <= fan_out
            assert role.clients == expected
    assert list(workers[0].holders) == list(range(size - servers, size if fan_out is None else size - servers + 1))


OPTIONS = StrategyOptions(strategy="server-sync", servers=2)


@pytest.mark.parametrize(
    ("options", "optimizer", "gradients", "compression", "told"),
    [
        (OPTIONS, {"optimizer": "lbfgs"}, {}, "none", "--strategy server-sync: LBFGS evaluates"),
        (OPTIONS, {"optimizer": "sparseadam"}, {}, "none", "--strategy server-sync: SparseAdam takes sparse"),
        (OPTIONS, {"optimizer": "adafactor"}, {}, "none", "--servers 2: Adafactor updates whole parameters"),
        (OPTIONS, {}, {"shard_optimizer": True}, "none", "--shard-optimizer"),
        (OPTIONS, {}, {}, "powersgd", "--compression powersgd: .* choose from none, fp16, bf16, int8, sign"),
        (
            StrategyOptions(strategy="server-async"),
            {},
            {"sync_batch_norm": True},
            "none",
            "--sync-batch-norm: ranks of --strategy server-async",
        ),
        (
            StrategyOptions(strategy="server-staleness", softsync=4),
            {},
            {},
            "none",
            "--softsync 4: there are 3 workers; choose 1 to 3",
        ),
        (StrategyOptions(strategy="easgd", servers=1), {}, {}, "bf16", "--compression bf16: easgd with servers sends"),
        (
            StrategyOptions(strategy="easgd", servers=1, inner_state="average"),
            {},
            {},
            "none",
            "--inner-state average: .* choose keep",
        ),
        (
            StrategyOptions(strategy="easgd", servers=1, period_schedule="rising"),
            {},
            {},
            "none",
            "--period-schedule rising: .* choose constant",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    options: StrategyOptions,
    optimizer: dict[str, str],
    gradients: dict[str, bool],
    compression: str,
    told: str,
) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        check_served(
            options,
            GradientOptions(**gradients),  # type: ignore[arg-type]
            OptimizerOptions(**optimizer),  # type: ignore[arg-type]
            nn.Linear(3, 3),
            4,
            CompressionOptions(compression=compression),
        )
    assert "\n" not in str(refused.value)


def test_models_that_no_server_can_hold_are_refused() -> None:
    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ConfigError, match=r"parameter weight is of torch\.complex64"):
        Vectors(complex_model, 1)
    with pytest.raises(ConfigError, match="no parameters to train"):
        Vectors(nn.Linear(2, 2).requires_grad_(False), 1)


def mixed_model() -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[Any] = [nn.Conv2d(2, 3, 3), nn.Linear(5, 7).double(), nn.Linear(7, 1)]
    layers[2].bias.requires_grad_(False)
    layers[0].weight = nn.Parameter(layers[0].weight.detach().contiguous(memory_format=torch.channels_last))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("shards", [1, 2, 3, 200])
def test_shards_step_as_the_whole_does(shards: int) -> None:
    """Two dtypes, a frozen parameter, channels_last, and more shards than there are elements in a vector."""
    model, serial = mixed_model(), mixed_model()
    vectors = Vectors(model, shards)
    values, gradients = vectors.memory(), vectors.memory()
    for value, gradient in zip(values, gradients, strict=True):
        for parameter, slot, other in zip(value.parameters, value.slots, gradient.slots, strict=True):
            slot.copy_(parameter.detach())
            other.copy_(parameter.detach().cos())
    for parameter in serial.parameters():
        parameter.grad = parameter.detach().cos()
    optimizer = torch.optim.AdamW([one for one in serial.parameters() if one.requires_grad], lr=0.1)
    norm = nn.utils.get_total_norm([one.grad for one in optimizer.param_groups[0]["params"]])
    squares = 0.0
    for shard in range(shards):
        master = Master(vectors, shard, lambda groups: torch.optim.AdamW(groups, lr=1.0))
        for mine, own, whole, gradient, piece in zip(
            master.values, master.gradient, values, gradients, vectors.pieces(shard), strict=True
        ):
            mine.copy_(whole.buffer[piece])
            own.copy_(gradient.buffer[piece])
        squares += float(master.norm()) ** 2
        master.step(0.1)
        for mine, whole, piece in zip(master.values, values, vectors.pieces(shard), strict=True):
            whole.buffer[piece] = mine
    optimizer.step()
    assert math.sqrt(squares) == pytest.approx(float(norm), rel=1e-5)
    expected = dict(zip(map(id, model.parameters()), serial.parameters(), strict=True))
    for value in values:
        for parameter, slot in zip(value.parameters, value.slots, strict=True):
            torch.testing.assert_close(slot, expected[id(parameter)].detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("name", [name for name in CODECS if name != "none"])
def test_wires_carry_gradients_and_keep_what_is_lost(name: str, feedback: bool) -> None:
    vectors = Vectors(mixed_model(), 2)
    options = CompressionOptions(compression=name, error_feedback=feedback)
    sending, receiving = (make_wires(options, vectors, 1, 7, 0) for _ in range(2))
    assert sending is not None
    assert receiving is not None
    gradients = [
        torch.randn(piece.stop - piece.start, dtype=dtype)
        for piece, dtype in zip(vectors.pieces(1), vectors.dtypes, strict=True)
    ]
    for wire, other, gradient in zip(sending, receiving, gradients, strict=True):
        assert wire.message.nbytes < gradient.nbytes
        total, sent = torch.zeros_like(gradient), torch.zeros_like(gradient)
        for _ in range(4):
            wire.encode(gradient)
            other.message.copy_(wire.message)
            arrived = torch.empty_like(gradient)
            other.decode(arrived)
            total, sent = total + gradient, sent + arrived
        if feedback:
            residual = wire.state_dict()["residual"]
            torch.testing.assert_close(sent + residual, total, rtol=1e-5, atol=1e-5)
        elif name in ("fp16", "bf16"):
            torch.testing.assert_close(sent, total, rtol=1e-2, atol=1e-2)


def test_wires_go_on_from_their_state() -> None:
    vectors = Vectors(nn.Linear(9, 9), 1)
    for name in ("int8", "sign"):
        options = CompressionOptions(compression=name, error_feedback=True)
        one, other = (make_wires(options, vectors, 0, 7, 0) for _ in range(2))
        assert one is not None
        assert other is not None
        one[0].encode(torch.randn(90))
        other[0].load_state_dict(one[0].state_dict())
        gradient = torch.randn(90)
        one[0].encode(gradient)
        other[0].encode(gradient)
        assert torch.equal(one[0].message, other[0].message)


def test_no_wires_without_compression() -> None:
    assert make_wires(CompressionOptions(), Vectors(nn.Linear(2, 2), 1), 0, 0, 0) is None


def staleness_of(rule: Rule, versions: Sequence[int]) -> dict[int, int]:
    put(rule, 0, 6.0)
    rule.push(Push(0, 0.1, versions), 10)
    return dict(rule.staleness)


def test_sums_of_leaves_count_every_gradient() -> None:
    rule = Softsync(memory(), 2, divide=True)
    assert staleness_of(rule, [10, 8, 4]) == {0: 1, 2: 1, 6: 1}
    # The mean of 1, 1/2 and 1/6, of the sum 6, over 3 gradients.
    assert held(rule) == pytest.approx(6.0 * (1 + 1 / 2 + 1 / 6) / 3 / 3)
