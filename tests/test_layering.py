"""Imports point down only: a module imports its own package and the layers below it.

The imports are read from the sources, those inside functions and under TYPE_CHECKING too, so nothing is loaded.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "allreduce_sgd"

# From the top down. What stands on one line may not import one another. "" is allreduce_sgd/__init__.py.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"", "train", "sweep", "benchmarks"}),
    frozenset({"preparation", "console"}),
    frozenset({"trainer", "command_line", "start", "resume", "checks", "probes"}),
    frozenset({"stepper", "evaluator"}),
    frozenset({"run_folder", "feed", "report", "toml_file", "toml_table", "mpirun", "selection"}),
    frozenset({"config", "progress"}),
    frozenset({"strategies", "checkpoint", "metrics", "stopwatch", "stopping", "preemption", "display", "trace"}),
    frozenset({"gradients", "optim", "chrome_trace"}),
    frozenset({"compression"}),
    frozenset({"comm"}),
    frozenset({"failure"}),
    frozenset({"schedules", "topology"}),
    frozenset({"deadline", "durable", "interfaces", "random_state"}),
    frozenset({"errors", "options"}),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Leaves hang beside the layers: they know nothing of communication, and only the modules that compose a run know them.
LEAVES = frozenset({"data", "models", "user_code"})
BELOW_LEAVES = frozenset({"errors", "options", "user_code"})
ABOVE_LEAVES = frozenset(
    {"config", "feed", "stepper", "evaluator", "checks", "probes", "trainer", "preparation", "train", "benchmarks"}
)

# Where a third-party module may be imported, as beginnings of paths within the package.
HOMES = {
    "mpi4py": ("topology.py", "topology/", "comm/"),
    "torch.distributed": ("comm/torch_distributed.py",),
    "horovod": ("comm/horovod.py",),
}

# `--help` and a mistyped flag must not wait for these to load.
SLOW = frozenset({"torch", "numpy"})


class Import(NamedTuple):
    name: str
    """In full: `from a.b import c` is a.b.c."""
    line: int
    at_load: bool
    """Whether importing the module runs it: not inside a function, not under TYPE_CHECKING."""


def read_imports(source: str, path: str) -> list[Import]:
    """Return what `source`, the text of `path` (relative to the package), imports or names as torch.distributed."""
    package = [PACKAGE, *Path(path).parts[:-1]]
    tree = statements(ast.parse(source), at_load=True)
    return [Import(name, node.lineno, at_load) for node, at_load in tree for name in names(node, package)]


def statements(node: ast.AST, at_load: bool) -> Iterator[tuple[ast.expr | ast.stmt, bool]]:
    """Yield every expression and statement below `node`, with whether loading the module runs it."""
    for field, value in ast.iter_fields(node):
        runs = at_load and not (
            (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and field == "body")
            or (isinstance(node, ast.If) and field == "body" and "TYPE_CHECKING" in ast.unparse(node.test))
        )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                if isinstance(child, ast.expr | ast.stmt):
                    yield child, runs
                yield from statements(child, runs)


def names(node: ast.expr | ast.stmt, package: list[str]) -> list[str]:
    """Return the full names that one statement or expression imports."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            return [f"{module}.{alias.name}" for alias in node.names]
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            return [name] if ast.unparse(function).split(".")[-1] in ("import_module", "__import__") else []
        # `import torch` gives torch.distributed without importing it by that name.
        case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
            return ["torch.distributed"]
    return []


def component(path: str) -> str:
    """comm/mpi.py → comm, trainer.py → trainer, __init__.py → ''."""
    first = Path(path).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def violations(source: str, path: str) -> list[str]:
    """Return what is wrong with the imports of one module of the package, a line each."""
    found = []
    own = component(path)
    if own not in LEVEL and own not in LEAVES:
        found.append(f"{path}: {own} has no place in LAYERS of tests/test_layering.py")
    for name, line, at_load in read_imports(source, path):
        why = wrong_place(name, path) or wrong_layer(name, own) or (at_load and too_slow(name, path))
        if why:
            found.append(f"{path}:{line}: imports {name}: {why}")
    return found


def wrong_place(name: str, path: str) -> str | None:
    for module, homes in HOMES.items():
        if f"{name}.".startswith(f"{module}.") and not path.startswith(homes):
            return f"only {', '.join(homes)} may"
    return None


def wrong_layer(name: str, own: str) -> str | None:
    parts = name.split(".")
    if parts[0] in ("benchmarks", "tests"):
        return f"the package does not depend on {parts[0]}"
    if parts[0] != PACKAGE:
        return None
    other = parts[1] if len(parts) > 1 else ""
    if other.startswith("__"):
        other = ""
    if other == own or (own == "config" and parts[2:3] == ["options"]):
        return None
    if other in LEAVES and own in LEAVES:
        return None if other in BELOW_LEAVES else f"{own} and {other} are leaves"
    if own in LEAVES:
        return None if other in BELOW_LEAVES else f"{own} is a leaf"
    if other in LEAVES:
        return None if own in ABOVE_LEAVES else f"{other} is a leaf, for {', '.join(sorted(ABOVE_LEAVES))}"
    if other not in LEVEL:
        return f"{other} has no place in LAYERS of tests/test_layering.py"
    return None if own not in LEVEL or LEVEL[other] > LEVEL[own] else f"{other or PACKAGE} is not below {own}"


def too_slow(name: str, path: str) -> str | None:
    light = Path(path).name in ("options.py", "__init__.py") or path in ("errors.py", "config.py")
    return "slow to load" if light and name.split(".")[0] in SLOW else None


def modules() -> list[str]:
    folder = ROOT / PACKAGE
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))


def test_modules_are_found() -> None:
    assert "errors.py" in modules()


@pytest.mark.parametrize("path", modules())
def test_imports_point_down(path: str) -> None:
    found = violations((ROOT / PACKAGE / path).read_text(), path)
    assert not found, "\n".join(found)


@pytest.mark.skipif(not (ROOT / PACKAGE / "config.py").exists(), reason="config.py is not there yet")
def test_config_loads_no_torch() -> None:
    program = f"import {PACKAGE}.config, sys; print(*({set(SLOW)} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainer.py", "from allreduce_sgd.config import Config"),
        ("trainer.py", "from allreduce_sgd.data.digits import load"),
        ("config.py", "import allreduce_sgd.strategies.options"),
        ("config.py", "from allreduce_sgd.trainer.options import TrainerOptions"),
        ("comm/mpi.py", "from mpi4py import MPI"),
        ("comm/mpi.py", "from .base import Work\nfrom . import base\nfrom ..schedules import ring"),
        ("comm/torch_distributed.py", "import torch.distributed as dist"),
        ("topology.py", "def f():\n    from mpi4py import MPI"),
        ("data/user.py", "from allreduce_sgd.user_code import load"),
        ("errors.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("optim/options.py", "def f():\n    import numpy"),
        ("comm/mpi.py", "import torch\ntorch.distributed_like"),
    ],
)
def test_checker_accepts(path: str, source: str) -> None:
    assert violations(source, path) == []


@pytest.mark.parametrize(
    ("path", "source", "named"),
    [
        ("comm/mpi.py", "from allreduce_sgd.gradients.buckets import Bucket", "gradients is not below comm"),
        ("comm/mpi.py", "def f():\n    import allreduce_sgd.trainer", "mpi.py:2"),
        ("comm/mpi.py", "from ..trainer import Trainer", "trainer"),
        ("comm/mpi.py", "from .. import trainer", "trainer"),
        ("comm/mpi.py", "from allreduce_sgd import trainer", "trainer"),
        ("comm/mpi.py", "if TYPE_CHECKING:\n    from allreduce_sgd.strategies.base import Strategy", "strategies"),
        ("comm/mpi.py", "import importlib\nimportlib.import_module('allreduce_sgd.trainer')", "trainer"),
        ("comm/mpi.py", "from allreduce_sgd import Trainer", "Trainer"),
        ("comm/mpi.py", "from allreduce_sgd.novelty import x", "novelty has no place"),
        ("novelty.py", "", "novelty has no place"),
        ("schedules/ring.py", "from allreduce_sgd.topology import Topology", "topology is not below schedules"),
        ("strategies/base.py", "from allreduce_sgd.checkpoint import save", "checkpoint is not below strategies"),
        ("metrics.py", "from allreduce_sgd.strategies.options import X", "strategies is not below metrics"),
        ("data/idx.py", "from allreduce_sgd.comm.base import Work", "data is a leaf"),
        ("data/idx.py", "from allreduce_sgd.models.cnn import build", "leaves"),
        ("user_code.py", "from allreduce_sgd.data.user import load", "leaves"),
        ("strategies/base.py", "from allreduce_sgd.data.digits import load", "data is a leaf"),
        ("trainer.py", "from mpi4py import MPI", "only topology.py"),
        ("comm/mpi.py", "import torch.distributed", "only comm/torch_distributed.py"),
        ("comm/mpi.py", "from torch import distributed", "only comm/torch_distributed.py"),
        ("comm/mpi.py", "import torch\ntorch.distributed.barrier()", "only comm/torch_distributed.py"),
        ("comm/mpi.py", "import horovod.torch as hvd", "only comm/horovod.py"),
        ("comm/options.py", "import torch", "slow to load"),
        ("comm/__init__.py", "try:\n    import numpy as np\nexcept ImportError:\n    pass", "slow to load"),
        ("config.py", "class A:\n    from torch import Tensor", "slow to load"),
        ("trainer.py", "from benchmarks.table import Table", "benchmarks"),
    ],
)
def test_checker_refuses(path: str, source: str, named: str) -> None:
    found = violations(source, path)
    assert found
    assert any(named in line for line in found), found
