"""Every mistake of a user ends all ranks with status 2 and one line on standard error, and leaves nothing behind."""

from pathlib import Path

import pytest

from allreduce_sgd.train import main
from tests.warm_start import mpirun, python

TRAIN = ["-m", "allreduce_sgd.train"]

CASES = [
    (["--modle", "mlp"], "unknown flag --modle"),
    (["--lr", "fast"], "--lr: 'fast' is not a number"),
    (["--strategy", "magic"], "--strategy: unknown value 'magic'; choose from"),
    (["--config", "{tmp}/bad.toml"], "is not valid TOML"),
    (["--config", "{tmp}/none.toml"], "--config: cannot read {tmp}/none.toml"),
    (["--dataset", "imagenet"], "--dataset imagenet: unknown"),
    (["--dataset", "mnist", "--data-dir", "{tmp}/none"], "train-images-idx3-ubyte"),
    (["--dataset", "npz:{tmp}/none.npz"], "none.npz"),
    (["--dataset", "tests.parts:nan_data"], "sample 17"),
    (["--dataset", "tests.parts:missing"], "missing"),
    (["--model", "transformer"], "--model transformer: unknown"),
    (["--model", "tests.parts:not_a_module"], "--model tests.parts:not_a_module"),
    (["--model", "tests.parts:raising_model"], "KeyError"),
    (["--model", "chargpt"], "--model chargpt"),
    (["--loss", "huber"], "--loss"),
    (["--optimizer", "sdg"], "--optimizer: unknown optimizer 'sdg'; choose from"),
    (["--optimizer", "adam", "--momentum", "0.9"], "--momentum: Adam has no such option"),
    (["--trust", "0.1"], "--trust: SGD has no such option"),
    (["--optimizer", "newton"], "--optimizer newton: the model has"),
    (
        ["--optimizer", "newton", "--model", "linear", "--strategy", "hogwild"],
        "--optimizer newton: strategy hogwild needs one that updates",
    ),
    (["--l1", "0.1", "--model", "tests.parts:sparse_model", "--momentum", "0"], "--l1: it changes all rows"),
    (["--l1-form", "proximal"], "--l1-form proximal: it has no use without --l1"),
    (["--lr-decay", "0.5"], "--lr-decay 0.5: --lr-schedule constant has no use for it"),
    (["--optimizer", "heavy-ball", "--compression", "dgc"], "--optimizer heavy-ball: --compression dgc has its own"),
    (["--optimizer", "newton", "--model", "linear", "--compression", "int8"], "--compression int8: a step of newton"),
    (["--device", "tpu"], "--device: unknown device 'tpu'"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--backend", "nccl", "--device", "cpu"], "--backend nccl"),
    (["--backend", "gloo", "--deterministic"], "--deterministic: --backend gloo"),
    (["--backend", "gloo", "--algorithm", "ring"], "--algorithm: --backend gloo"),
    (["--algorithm", "bruck"], "--algorithm: unknown value 'bruck'; choose from auto, shared-memory, two-level, ring"),
    (["--batch-size", "5000"], "--batch-size 5000: the mini-batch of"),
    (["--global-batch-size", "5000"], "--global-batch-size 5000: the mini-batch of"),
    (["--dataset", "tests.parts:course_samples", "--model", "tests.parts:fails_on_rank_1"], "fails_on_rank_1"),
    (["--model", "tests.parts:wrong_width"], "--loss cross-entropy: the model's outputs"),
    (["--model", "tests.parts:wrong_input"], "--model: it cannot take the samples of --dataset digits"),
    (["--precision", "fp8"], "--precision: unknown value 'fp8'; choose from fp32, bf16, fp16"),
    (["--precision", "fp16", "--optimizer", "lbfgs"], "--precision fp16: LBFGS evaluates the loss several times"),
    (["--precision", "fp16", "--check-finite"], "--check-finite: with --precision fp16 gradients overflow"),
    (["--check-sync", "0"], "--check-sync: 0 is out of range; it must be at least 1"),
    (["--buffers", "keep"], "--buffers: unknown value 'keep'; choose from leave, average, broadcast"),
    (["--shard-optimizer", "--optimizer", "lbfgs"], "--shard-optimizer: LBFGS decides by the whole gradient"),
    (["--shard-optimizer", "--model", "tests.parts:sparse_model"], "--shard-optimizer: the model has embeddings"),
    (["--shard-optimizer", "--strategy", "local"], "--shard-optimizer: only --strategy sync can do it"),
    (["--no-find-unused-parameters", "--strategy", "local"], "--no-find-unused-parameters: only --strategy sync"),
    (
        ["--sync-batch-norm", "--strategy", "local"],
        "--sync-batch-norm: --strategy local has no use for it, only sync, delayed",
    ),
    (["--sync-batch-norm", "--model", "tests.parts:own_norm_model"], "--sync-batch-norm: convert_sync_batchnorm"),
    (
        ["--sync-batch-norm", "--global-batch-size", "1437", "--accumulate", "2"],
        "--sync-batch-norm: the last mini-batch of an epoch has 1 sample, too few for 1 rank and 2 rounds",
    ),
    (["--strategy", "hogwild", "--period", "4"], "--period: --strategy hogwild has no use for it, only local, post-lo"),
    (["--strategy", "local", "--period", "5000"], "--period 5000: the run has only"),
    (["--strategy", "diloco", "--steps", "40"], "--period 500: the run has only 40 steps; choose 1 to 40"),
    (["--strategy", "delayed", "--delay", "60", "--steps", "50"], "--delay 60: the run has only 50 steps"),
    (["--strategy", "local", "--period", "4", "--delay", "4"], "--delay 4:"),
    (["--strategy", "post-local", "--switch", "soon"], "--switch soon:"),
    (["--strategy", "server-async", "--servers", "3"], "--servers 3: 1 rank started, and at least one beside the"),
    (["--strategy", "server-sync", "--servers", "0"], "--servers 0:"),
    (["--strategy", "gossip", "--check-sync", "2"], "--check-sync: ranks of --strategy gossip do not hold the same"),
    (["--straggler", "1"], "--straggler 1: give R:F, a rank from 0 on and a factor of at least 1"),
    (["--straggler", "7:2"], "--straggler 7:2: the ranks that train are 0 to"),
    (["--noise-scale", "5", "--strategy", "local"], "--noise-scale: --strategy local has no use for it, only sync"),
    (["--compression", "sign", "--strategy", "adasum"], "--compression sign: --strategy adasum combines whole"),
    (["--sampling", "random"], "--sampling: unknown value 'random'; choose from epoch, uniform, replacement"),
    (["--full-batch", "--batch-size", "8"], "--full-batch and --batch-size: give one of the two"),
    (["--strategy", "delayed", "--optimizer", "lbfgs"], "LBFGS"),
    (["--compression", "gzip"], "--compression: unknown value 'gzip'; choose from none, fp16, bf16, int8, sign, top-k"),
    (["--compression-rank", "2"], "--compression-rank: --compression none has no use for it, only powersgd"),
    (["--compression", "dgc", "--momentum", "0.9"], "--momentum 0.9: --compression dgc has its own"),
    (["--compression", "dgc", "--strategy", "local"], "--compression dgc: it corrects the momentum of gradients"),
    (["--timeout-seconds", "1e10"], "--timeout-seconds: 10000000000.0 is out of range"),
    (["--resume", "{tmp}/none"], "--resume: cannot read {tmp}/none/config.toml"),
    (["--output", "{tmp}/used"], "--output: the folder {tmp}/used is already used"),
    (["--output", "{tmp}/used/file"], "--output: {tmp}/used/file is a file"),
    (["--output", "{tmp}/used/file/deeper"], "--output: cannot write into"),
]


def prepare(folder: Path) -> None:
    (folder / "bad.toml").write_text("lr = ")
    (folder / "used").mkdir()
    (folder / "used" / "file").write_text("mine")


def assert_one_line(errors: str, status: int, text: str) -> None:
    assert status == 2, errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("allreduce-sgd: error: ")
    assert text in lines[0]


@pytest.mark.parametrize(("flags", "text"), CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_on_one_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], text: str) -> None:
    prepare(tmp_path)
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    output = [] if "--output" in flags else ["--output", str(tmp_path / "run")]
    status = main([*flags, *output])
    assert_one_line(capfd.readouterr().err, status, text.format(tmp=tmp_path))
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "used" / "file").read_text() == "mine"


# One of each phase: flags, file, download, data, model, optimizer, back end, size of the mini-batch, layers.
@pytest.mark.parametrize(
    ("flags", "text"),
    [CASES[index] for index in (0, 1, 3, 6, 8, 11, 15, 19, 20, 23, 38)],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_on_three_ranks_one_of_them_speaks(tmp_path: Path, flags: list[str], text: str) -> None:
    prepare(tmp_path)
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    output = [] if "--output" in flags else ["--output", str(tmp_path / "run")]
    done = mpirun(3, [*TRAIN, *flags, *output])
    assert_one_line(done.errors, done.status, text.format(tmp=tmp_path))
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_samples(tmp_path: Path) -> None:
    flags = ["--dataset", "tests.parts:three_samples", "--model", "linear", "--batch-size", "1"]
    done = mpirun(4, [*TRAIN, *flags, "--output", str(tmp_path / "run")])
    assert_one_line(done.errors, done.status, "4 ranks share 3 training samples; start fewer")


def test_the_wrong_launcher_is_refused_with_what_to_do(tmp_path: Path) -> None:
    # The launcher of another MPI says there are two ranks, and our MPI library knows nothing of it.
    other = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    done = python([*TRAIN, "--output", str(tmp_path / "run")], environment=other)
    assert_one_line(done.errors, done.status, "Open MPI started 2 ranks (OMPI_COMM_WORLD_SIZE=2), but MPI (MPICH")
    assert "start with the mpirun or mpiexec of that MPI library" in done.errors
    peer = python(TRAIN, environment={**other, "OMPI_COMM_WORLD_RANK": "1"})
    assert (peer.status, peer.errors) == (2, "")


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        {"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_plain_run_inside_a_batch_script_works(tmp_path: Path, environment: dict[str, str]) -> None:
    done = python([*TRAIN, "--steps", "2", "--output", str(tmp_path / "run")], environment=environment)
    assert (done.status, done.errors) == (0, "")


def test_srun_with_the_wrong_mpi_type_is_refused(tmp_path: Path) -> None:
    done = python(TRAIN, environment={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})
    assert_one_line(done.errors, done.status, "SLURM started 2 ranks (SLURM_STEP_NUM_TASKS=2)")
    assert "--mpi=" in done.errors
