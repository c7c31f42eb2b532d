"""The code of the README runs as it stands there."""

from pathlib import Path

import pytest

from tests.launching import ROOT, mpirun
from tests.snippets import snippets

CODES = [each.code for each in snippets(ROOT / "README.md", "python")]


@pytest.mark.parametrize("code", CODES, ids=["plain", "sharded"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_loops_of_the_readme_train_the_same_model_on_all_ranks(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, code: str
) -> None:
    program = tmp_path_factory.mktemp("readme") / "loop.py"
    # A file per rank: what ranks print at once comes mixed through the launcher.
    ending = "print(loss.item(), model.module.weight.tolist(), file=open(f'{__file__}.{comm.rank}', 'w'))\n"
    program.write_text(code + ending)
    done = mpirun(ranks, [str(program)])
    assert (done.status, done.errors) == (0, "")
    results = [Path(f"{program}.{rank}").read_text().split(maxsplit=1) for rank in range(ranks)]
    assert all(float(loss) < 0.01 for loss, _ in results)
    assert len({weight for _, weight in results}) == 1


def test_every_file_of_the_package_stands_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "allreduce_sgd").iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"\n  {path.name} " in text, path.name
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"  {path.name}/" in text, path.name
