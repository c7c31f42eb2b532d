"""Flags and TOML files: what is read, and that every mistake is one clear line."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from allreduce_sgd.command_line import parse
from allreduce_sgd.config import Config, options, to_toml
from allreduce_sgd.errors import ConfigError

FIXED_SURFACE = (
    "dataset data-dir model loss optimizer lr momentum batch-size global-batch-size epochs steps target-accuracy "
    "target-loss strategy period backend algorithm bucket-mb seed device timeout-seconds output resume"
).split()


def test_the_fixed_flags_are_there_and_names_are_unique() -> None:
    names = [each.name for each in options()]
    assert len(names) == len(set(names))
    assert set(FIXED_SURFACE) <= set(names)


def test_defaults_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('lr = 0.5\nbatch-size = 16\noptimizer = "adam"\nstandardize = false\n')
    config, explicit = parse(["--config", str(file), "--lr", "0.25", "--strategy", "LOCAL"])
    assert (config.optimizer.lr, config.training.batch_size, config.optimizer.optimizer) == (0.25, 16, "adam")
    assert config.data.standardize is False
    assert config.strategy.strategy == "local"
    assert explicit == {"lr", "strategy"}


def test_a_flag_replaces_the_other_of_its_pair_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("epochs = 3\nglobal-batch-size = 64\n")
    config, _ = parse(["--config", str(file), "--steps", "7", "--batch-size", "8"])
    assert (config.training.epochs, config.training.steps) == (None, 7)
    assert (config.training.global_batch_size, config.training.batch_size) == (None, 8)


def test_toml_reads_back_to_an_equal_configuration_without_the_folders_of_the_run(tmp_path: Path) -> None:
    config, _ = parse(
        ["--dataset", 'npz:a "b".npz', "--lr", "1e-3", "--steps", "5", "--tensorboard", "--output", "x", "--seed", "7"]
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    again, _ = parse(["--config", str(file)])
    assert again == dataclasses.replace(config, run=dataclasses.replace(config.run, output=None))
    for each in options():
        assert each.name in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--modle", "mlp"], "unknown flag --modle; did you mean --model?"),
        (["--zzz"], "unknown flag --zzz; --help lists all of them"),
        (["mlp"], "unexpected argument 'mlp'"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--lr", "nan"], "--lr: nan is out of range; it must be at least 0"),
        (["--lr", "-1"], "--lr: -1.0 is out of range; it must be at least 0"),
        (["--epochs", "0"], "--epochs: 0 is out of range; it must be at least 1"),
        (["--epochs", "1.5"], "--epochs: '1.5' is not a whole number"),
        (["--target-accuracy", "97"], "--target-accuracy: 97.0 is out of range; it must be more than 0 and at most 1"),
        (["--strategy", "magic"], "--strategy: unknown value 'magic'; choose from sync, delayed, dmb"),
        (["--backend", "rdma"], "--backend: unknown value 'rdma'; choose from auto, mpi, nccl, gloo, horovod, single"),
        (["--timeout-seconds", "inf"], "--timeout-seconds: inf is out of range"),
        (["--lr"], "--lr: expected one argument"),
        (["--epochs", "1", "--steps", "2"], "--epochs and --steps: give one of the two"),
        (["--batch-size", "1", "--global-batch-size", "2"], "--batch-size and --global-batch-size: give one"),
        (["--output", ""], "--output: '' is not a line of text"),
        (["--config", "/does/not/exist.toml"], "--config: cannot read /does/not/exist.toml: No such file"),
        (["--resume", "/does/not/exist"], "--resume: cannot read /does/not/exist/config.toml: No such file"),
        (["--resume", "a", "--config", "b"], "--config and --resume"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(arguments: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"lr = ", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"lr = 1\nlr = 2", "is not valid TOML"),
        (b"learning-rate = 1", "unknown option 'learning-rate'"),
        (b"bath-size = 1", "unknown option 'bath-size'; did you mean batch-size?"),
        (b"lr = 'x'", "lr: 'x' is not a number"),
        (b"epochs = 1.5", "epochs: 1.5 is not a whole number"),
        (b"epochs = true", "epochs: True is not a whole number"),
        (b"tensorboard = 1", "tensorboard: 1 is not true or false"),
        (b"lr = [1]", "options stand flat"),
        (b"[optimizer]\nlr = 1", "options stand flat|unknown|not a line"),
        (b"seed = -1", "seed: -1 is out of range"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=text) as caught:
        parse(["--config", str(file)])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_is_complete_and_loads_neither_torch_nor_mpi() -> None:
    code = (
        "import sys\nfrom allreduce_sgd.command_line import build_parser\nprint(build_parser().format_help())\n"
        "assert not {'torch', 'numpy', 'mpi4py'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    for each in options():
        assert f"--{each.name}" in done.stdout
        assert len(each.help) > 15


def test_default_configuration_is_valid() -> None:
    for each, value in zip(options(), Config().flat().values(), strict=True):
        assert each.check(value, "") == value
