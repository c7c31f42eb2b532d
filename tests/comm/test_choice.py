"""Tables of algorithms: which they are, where one ends and the next begins, and what is refused."""

import json

import pytest

from allreduce_sgd.comm.base import AlgorithmTable
from allreduce_sgd.comm.choice import Choice, Entry, default_between, default_choice, merge, named_choice
from allreduce_sgd.comm.options import ALGORITHMS
from allreduce_sgd.errors import ConfigError
from allreduce_sgd.schedules.catalogue import ALL_REDUCE

NAMES = [name for name in ALGORITHMS if name != "auto"]
WITH_MEMORY = ("shared-memory", "two-level")
INDEPENDENT_OF_CUTS = ("shared-memory", "two-level", "recursive-doubling", "halving-doubling", "tree", "chain")


def test_the_flag_names_every_algorithm_there_is() -> None:
    assert set(NAMES) == {"mpi", *WITH_MEMORY, *ALL_REDUCE}


@pytest.mark.parametrize("name", NAMES)
def test_a_named_algorithm_serves_all_sizes(name: str) -> None:
    choice = named_choice(name, nodes=1, shared_memory=True, deterministic=False)
    assert choice.name == name
    assert {choice.for_message(n_bytes).algorithm for n_bytes in (0, 1, 4096, 2**40)} == {name}
    cut = choice.for_message(2**30).segment_bytes
    assert (cut is not None and cut >= 64 * 1024) if name in ("segmented-ring", "chain") else cut is None
    assert choice.between == default_between(deterministic=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_algorithm_that_does_not_suit_is_refused_in_one_line(name: str) -> None:
    if name in WITH_MEMORY:
        with pytest.raises(ConfigError, match=rf"^--algorithm {name}: .* cannot share memory .* choose auto, ring .*$"):
            named_choice(name, nodes=1, shared_memory=False, deterministic=False)
    else:
        assert named_choice(name, nodes=3, shared_memory=False, deterministic=False).name == name
    if name == "shared-memory":
        with pytest.raises(ConfigError, match=r"^--algorithm shared-memory: .* 3 nodes; choose two-level or auto$"):
            named_choice(name, nodes=3, shared_memory=True, deterministic=False)
    else:
        assert named_choice(name, nodes=3, shared_memory=True, deterministic=False).name == name


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_takes_those_alone_that_add_in_one_order(name: str) -> None:
    if name in INDEPENDENT_OF_CUTS:
        choice = named_choice(name, nodes=1, shared_memory=True, deterministic=True)
        assert choice.name == name
        assert {entry.algorithm for entry in choice.between} <= set(INDEPENDENT_OF_CUTS)
    else:
        with pytest.raises(ConfigError, match=rf"^--deterministic: {name} adds in an order .*$") as refusal:
            named_choice(name, nodes=1, shared_memory=True, deterministic=True)
        assert all(allowed in str(refusal.value) for allowed in ("auto", *INDEPENDENT_OF_CUTS))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("nodes", "shared_memory"), [(1, True), (2, True), (7, True), (1, False), (4, False)])
def test_the_default_suits_and_covers_all_sizes(nodes: int, shared_memory: bool, deterministic: bool) -> None:
    choice = default_choice(nodes, shared_memory, deterministic)
    assert choice.suits(nodes, shared_memory)
    used = {choice.for_message(1 << power).algorithm for power in range(40)}
    across = {choice.for_between(1 << power).algorithm for power in range(40)}
    assert across <= set(ALL_REDUCE)
    if shared_memory:
        assert used == {"shared-memory" if nodes == 1 else "two-level"}
    else:
        assert used == across
    if deterministic:
        assert used | across <= set(INDEPENDENT_OF_CUTS)
        # Where sizes use several, these add along the same tree of ranks.
        assert across == {"recursive-doubling", "halving-doubling"}
    else:
        assert "segmented-ring" in across


TABLE = Choice(
    (Entry(100, "mpi"), Entry(5000, "ring"), Entry(None, "segmented-ring", 65536)),
    (Entry(64, "tree"), Entry(None, "chain", 4096)),
)


@pytest.mark.parametrize(
    ("n_bytes", "message", "between"),
    [
        (0, "mpi", "tree"),
        (64, "mpi", "tree"),
        (65, "mpi", "chain"),
        (100, "mpi", "chain"),
        (101, "ring", "chain"),
        (5000, "ring", "chain"),
        (5001, "segmented-ring", "chain"),
        (2**50, "segmented-ring", "chain"),
    ],
)
def test_limits_belong_to_the_smaller_side(n_bytes: int, message: str, between: str) -> None:
    assert TABLE.for_message(n_bytes).algorithm == message
    assert TABLE.for_between(n_bytes).algorithm == between
    assert TABLE.name == "segmented-ring"


def test_entries_for_people() -> None:
    assert TABLE.for_message(101).describe() == "ring"
    assert TABLE.for_message(2**20).describe() == "segmented-ring in segments of 65,536 bytes"


@pytest.mark.parametrize(
    ("names", "shared_memory", "one_node", "two_nodes"),
    [
        (("shared-memory",), True, True, False),
        (("mpi", "shared-memory"), True, True, False),
        (("mpi", "two-level"), True, True, True),
        (("ring", "two-level", "chain"), True, True, True),
        (("mpi", "ring"), True, True, True),
        (("shared-memory",), False, False, False),
        (("mpi", "two-level"), False, False, False),
        (("two-level", "chain"), False, False, False),
        (("mpi", "ring", "chain"), False, True, True),
    ],
)
def test_what_suits(names: tuple[str, ...], shared_memory: bool, one_node: bool, two_nodes: bool) -> None:
    entries = [Entry(10**index, name) for index, name in enumerate(names)]
    choice = Choice((*entries[:-1], entries[-1]._replace(limit_bytes=None)), default_between(deterministic=False))
    assert choice.suits(1, shared_memory) is one_node
    assert choice.suits(2, shared_memory) is two_nodes


def test_neighbours_of_one_algorithm_are_merged() -> None:
    entries = [
        Entry(1, "tree"),
        Entry(2, "tree"),
        Entry(4, "chain", 64),
        Entry(8, "chain", 128),
        Entry(16, "tree"),
        Entry(32, "ring"),
        Entry(64, "ring"),
    ]
    wanted = (Entry(2, "tree"), Entry(8, "chain", 128), Entry(16, "tree"), Entry(None, "ring"))
    assert merge(entries) == wanted
    assert merge(iter(entries)) == wanted
    assert merge([Entry(8, "tree")]) == (Entry(None, "tree"),)


def tables() -> list[Choice]:
    made = [named_choice(name, 1, True, False) for name in NAMES]
    made += [default_choice(nodes, nodes > 2, fixed) for nodes in (1, 2, 3, 4) for fixed in (False, True)]
    return [*made, TABLE]


def test_a_table_survives_json() -> None:
    for choice in tables():
        lists = choice.to_lists()
        assert Choice.from_lists(lists) == choice
        again = Choice.from_lists(json.loads(json.dumps(lists)))
        assert again == choice
        # Not only equal, but as usable: entries have names.
        assert again.for_message(2**20).describe() == choice.for_message(2**20).describe()


LAST: list[int | str | None] = [None, "ring", None]


@pytest.mark.parametrize(
    "lists",
    [
        [],
        [[LAST]],
        [[LAST], [LAST], [LAST]],
        [[], [LAST]],
        [[LAST], []],
        [[[100, "ring", None]], [LAST]],
        [[LAST], [[100, "ring", None]]],
        [[LAST, [100, "tree", None]], [LAST]],
        [[[None, "rink", None]], [LAST]],
        [[[None, None, None]], [LAST]],
        [[[None, 7, None]], [LAST]],
        [[["100", "ring", None], LAST], [LAST]],
        [[[None, "ring", "64"]], [LAST]],
        [[[None, "ring"]], [LAST]],
        [[[None, "ring", None, None]], [LAST]],
    ],
    ids=str,
)
def test_lists_that_are_no_table_are_refused(lists: AlgorithmTable) -> None:
    with pytest.raises(ValueError, match=r"table|unpack"):
        Choice.from_lists(lists)
