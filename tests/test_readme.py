"""The code of the README runs as it stands there."""

import re

import pytest

from tests.launching import ROOT, mpirun


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_loop_of_the_readme_trains_the_same_model_on_all_ranks(
    tmp_path_factory: pytest.TempPathFactory, ranks: int
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    program = tmp_path_factory.mktemp("readme") / "loop.py"
    program.write_text(code + "print('loss below', loss.item() < 0.01, model.module.weight.tolist())\n")
    done = mpirun(ranks, [str(program)])
    assert (done.status, done.errors) == (0, "")
    lines = done.output.strip().splitlines()
    assert len(lines) == ranks
    assert len(set(lines)) == 1 or all("loss below True" in line for line in lines)
    assert len({line.split("True ")[1] for line in lines}) == 1


def test_every_file_of_the_package_stands_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "allreduce_sgd").iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"\n  {path.name} " in text, path.name
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"  {path.name}/" in text, path.name
