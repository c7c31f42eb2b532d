"""What pages say holds: flags exist, commands parse, quoted messages stand in the sources, strategies are all told."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from allreduce_sgd.command_line import parse
from allreduce_sgd.config import options
from allreduce_sgd.schedules.catalogue import ALL_REDUCE
from allreduce_sgd.strategies.options import PERIODS, STRATEGIES
from allreduce_sgd.sweep.spec import read_spec
from tests.launching import ROOT
from tests.snippets import snippets, training_commands

PAGES = sorted((ROOT / "docs").glob("*.md"))
# Of the launchers, of SLURM and of the program itself, rather than options of a run.
OTHER_FLAGS = {
    *("config", "help", "interface", "rsh", "on-failure", "mpi", "signal"),
    *("ntasks-per-node", "cpus-per-task", "gpus-per-node"),
    *("ranks", "ranks-per-trial"),  # of sweeps
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_named_in_the_text_exist(page: Path) -> None:
    known = {each.name for each in options()} | {f"no-{each.name}" for each in options() if each.kind is bool}
    for flag in re.findall(r"`--([a-z][a-z0-9-]*)", page.read_text(encoding="utf-8")):
        assert flag in known | OTHER_FLAGS, flag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_trainer_parse(page: Path) -> None:
    for arguments in training_commands(page):
        if "--resume" not in arguments:
            parse(arguments)


def test_there_are_commands_to_parse() -> None:
    assert sum(len(training_commands(page)) for page in PAGES) > 20


def test_every_strategy_and_algorithm_has_its_place() -> None:
    strategies = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    for name in STRATEGIES:
        assert re.search(rf"^\| \[?`{name}`", strategies, re.MULTILINE), name
        if name not in ("sync", "hogwild", "server-sync"):
            assert f"{{{{ flags {name} }}}}" in strategies, name
    for name, period in PERIODS.items():
        assert re.search(rf"^\| \[`{name}`\]\S+ \| \S+ - x\$ \| (1, then )?{period} \|", strategies, re.MULTILINE), name
    algorithms = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name in ALL_REDUCE:
        assert f"{{{{ diagram {name} 4 }}}}" in algorithms, name


@cache
def messages() -> str:
    """All texts of the package, one a line, with … for what is filled in."""
    texts = []
    for path in sorted((ROOT / "allreduce_sgd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def quoted() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^`(.+)`\n:   ", text, re.MULTILINE)


def test_every_message_quoted_stands_in_the_sources() -> None:
    found = quoted()
    assert len(found) > 30
    for message in found:
        assert message in messages(), message
        # Not only names and numbers: something to search for.
        assert len(message.replace("…", "").strip(" :,;.()")) >= 3


def test_every_page_is_short() -> None:
    for page in PAGES:
        assert len(page.read_text(encoding="utf-8").split()) < 2000, page.name


def test_every_program_named_exists() -> None:
    blocks = [each.code for page in PAGES for each in snippets(page, "sh")]
    modules = set(re.findall(r"^(?:mpirun -np \d+ )?python -m ([\w.]+)", "\n".join(blocks), re.MULTILINE))
    assert {"allreduce_sgd.train", "benchmarks.collectives"} <= modules
    for module in modules:
        assert find_spec(module) is not None, module
    for script in re.findall(r"\b((?:launch|slurm)/[\w.]+)", "\n".join(blocks)):
        assert (ROOT / script).is_file(), script


def test_the_spec_of_a_sweep_is_one(tmp_path: Path) -> None:
    (snippet,) = snippets(ROOT / "docs" / "experiments.md", "toml")
    (tmp_path / "sweep.toml").write_text(snippet.code)
    spec, _ = read_spec(str(tmp_path / "sweep.toml"))
    assert (spec.method, spec.trials) == ("random", 8)
