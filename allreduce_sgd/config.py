"""The configuration of a run: the option dataclasses of all parts, composed, checked and written as TOML.

Option names are unique over all groups, so that they are flat on the command line and in TOML. Imports no torch.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import tomli_w

from allreduce_sgd.comm.options import CommunicationOptions
from allreduce_sgd.compression.options import CompressionOptions
from allreduce_sgd.data.options import DataOptions
from allreduce_sgd.errors import ConfigError, quoted
from allreduce_sgd.gradients.options import GradientOptions
from allreduce_sgd.models.options import ModelOptions
from allreduce_sgd.optim.options import OptimizerOptions
from allreduce_sgd.options import option
from allreduce_sgd.probes.options import ProbeOptions
from allreduce_sgd.selection.options import SelectionOptions
from allreduce_sgd.strategies.options import BELONGS, LOCAL, StrategyOptions

__all__ = [
    "OF_ONE_RUN",
    "Config",
    "Option",
    "RunOptions",
    "TrainingOptions",
    "check_text",
    "config_from",
    "options",
    "to_toml",
]

PRECISIONS = ("fp32", "bf16", "fp16")
# What neither a resumed run nor one made from a config.toml takes over.
OF_ONE_RUN = ("output", "resume", "pause-after-steps", "pause-after-epochs")


@dataclass(frozen=True)
class TrainingOptions:
    epochs: int | None = option(None, "passes over the training set; not set: 20, or until --steps", minimum=1)
    steps: int | None = option(None, "optimizer steps, instead of --epochs", minimum=1)
    batch_size: int | None = option(
        None, "samples per rank (--virtual-ranks: per virtual one), step and accumulation round; not set: 32", minimum=1
    )
    global_batch_size: int | None = option(
        None,
        "samples of all ranks per step, instead of --batch-size: the same training on any number of ranks",
        minimum=1,
    )
    full_batch: bool = option(
        False, "take all training samples in every step (gradient descent), instead of --batch-size"
    )
    accumulate: int = option(1, "rounds of forward and backward per optimizer step", minimum=1)
    precision: str = option(
        "fp32",
        "fp32, or automatic mixed precision in bf16 or fp16, where parameters and gradients stay fp32; fp16 scales the "
        "loss, and skips steps whose gradients overflow: all ranks together, where ranks step alone each by itself",
        choices=PRECISIONS,
    )
    target_accuracy: float | None = option(
        None, "stop when an evaluation reaches this test accuracy (a fraction)", above=0, maximum=1
    )
    target_loss: float | None = option(None, "stop when an evaluation reaches this test loss")
    evaluate_every: int | None = option(None, "steps between two evaluations; not set: one per epoch", minimum=1)
    seed: int = option(0, "seed of the initial model, the sample order and dropout", minimum=0)
    device: str = option("auto", "auto, cpu, cuda (this rank's own GPU) or cuda:K", metavar="DEVICE")
    threads: int | None = option(
        None, "compute threads per rank; not set: OMP_NUM_THREADS, or the node's cores divided by its ranks", minimum=1
    )


@dataclass(frozen=True)
class RunOptions:
    output: str | None = option(
        None, "folder of this run's results, new or empty; not set: runs/<time>-<name>", metavar="DIR"
    )
    resume: str | None = option(
        None,
        "go on from the latest checkpoint of this run's folder (or from one of its checkpoints' folders), with its "
        "configuration; results go on in the same folder, or start a new one with --output",
        metavar="DIR",
    )
    checkpoint_every: int | None = option(None, "steps between two checkpoints; not set: one at the end", minimum=1)
    pause_after_steps: int | None = option(
        None,
        "evaluate, write a checkpoint and stop after so many steps, with status 75: the first part of the run that "
        "--steps or --epochs describes, whose learning rate takes its course to that end; go on with --resume",
        minimum=1,
    )
    pause_after_epochs: int | None = option(
        None, "the same after so many passes over the training set, instead of --pause-after-steps", minimum=1
    )
    keep_checkpoints: int = option(3, "how many of the latest checkpoints to keep", minimum=1)
    grace_seconds: float = option(
        30.0,
        "how soon after SIGTERM a checkpoint must be written, at the end of an evaluation if one is under way; past "
        "that the run ends with status 1",
        above=0,
    )
    log_every: int = option(10, "steps between two lines of metrics.jsonl", minimum=1)
    tensorboard: bool = option(False, "write TensorBoard event files too (needs the package tensorboard)")
    trace: str | None = option(
        None,
        "write a timeline of one early step of all ranks that train here, with their collectives: a Chrome trace for "
        "ui.perfetto.dev",
        metavar="FILE",
    )


@dataclass(frozen=True)
class Config:
    data: DataOptions = field(default_factory=DataOptions, metadata={"title": "data"})
    model: ModelOptions = field(default_factory=ModelOptions, metadata={"title": "model and loss"})
    training: TrainingOptions = field(default_factory=TrainingOptions, metadata={"title": "training"})
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions, metadata={"title": "optimizer"})
    selection: SelectionOptions = field(
        default_factory=SelectionOptions, metadata={"title": "early stopping and averages of weights"}
    )
    strategy: StrategyOptions = field(default_factory=StrategyOptions, metadata={"title": "distribution strategy"})
    communication: CommunicationOptions = field(
        default_factory=CommunicationOptions, metadata={"title": "communication"}
    )
    gradients: GradientOptions = field(default_factory=GradientOptions, metadata={"title": "gradients and replicas"})
    compression: CompressionOptions = field(
        default_factory=CompressionOptions, metadata={"title": "compression of gradients"}
    )
    probes: ProbeOptions = field(default_factory=ProbeOptions, metadata={"title": "what is tried before training"})
    run: RunOptions = field(default_factory=RunOptions, metadata={"title": "results and checkpoints"})

    def flat(self) -> dict[str, Any]:
        """Return all options by their kebab-case names."""
        return {each.name: getattr(getattr(self, each.group), each.name.replace("-", "_")) for each in options()}


@dataclass(frozen=True)
class Option:
    """One option as the command line and TOML see it."""

    name: str
    group: str
    title: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None
    minimum: float | None
    above: float | None
    maximum: float | None
    metavar: str | None

    def check(self, value: Any, source: str) -> Any:
        """Return `value` as this option's type, or raise ConfigError that names the source, the value and the rule."""
        where = f"{source}: " if source else ""
        name = f"--{self.name}" if not source else self.name
        if value is None and self.optional:
            return None
        if type(value) is int and abs(value) > _LARGEST_WHOLE:
            raise ConfigError(f"{where}{name}: {quoted(value)} is out of range; it must be at most {_LARGEST_WHOLE}")
        if self.kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, (str, int, float, bool)) or type(value) is not self.kind:
            raise ConfigError(f"{where}{name}: {quoted(value)} is not {_ARTICLES[self.kind]}")
        if self.choices is not None and isinstance(value, str):
            if value.lower() not in self.choices:
                raise ConfigError(
                    f"{where}{name}: unknown value {quoted(value)}; choose from {', '.join(self.choices)}"
                )
            return value.lower()
        if isinstance(value, int | float) and self.kind is not bool and not self._in_range(value):
            raise ConfigError(f"{where}{name}: {value} is out of range; {self._range()}")
        if isinstance(value, str):
            check_text(value, f"{where}{name}")
        return value

    def _in_range(self, value: float) -> bool:
        return (
            value == value
            and abs(value) != float("inf")
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
        )

    def _range(self) -> str:
        rules = []
        if self.minimum is not None:
            rules.append(f"at least {self.minimum:g}")
        if self.above is not None:
            rules.append(f"more than {self.above:g}")
        if self.maximum is not None:
            rules.append(f"at most {self.maximum:g}")
        return "it must be " + (" and ".join(rules) or "finite")


# Beyond it neither floating numbers nor the libraries' integers count exactly.
_LARGEST_WHOLE = 2**53
# That of paths in Linux.
_LONGEST_TEXT = 4096
# Line breaks, NUL and other controls, and halves of surrogate pairs, which stand for bytes that are not UTF-8.
_UNWANTED = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ARTICLES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def check_text(text: str, what: str) -> None:
    """Raise ConfigError, which begins with `what`, unless `text` is one line that files and terminals can take."""
    if not text.strip() or len(text) > _LONGEST_TEXT or _UNWANTED.search(text):
        raise ConfigError(f"{what}: {quoted(text)} is not a line of text of at most {_LONGEST_TEXT} characters")


def options() -> Iterator[Option]:
    """Yield every option, in the order of `--help`."""
    for group in dataclasses.fields(Config):
        kind = typing.cast(type, group.type)
        hints = typing.get_type_hints(kind)
        for each in dataclasses.fields(kind):
            hint = hints[each.name]
            optional = isinstance(hint, types.UnionType)
            base = next(part for part in typing.get_args(hint) if part is not type(None)) if optional else hint
            yield Option(
                each.name.replace("_", "-"),
                group.name,
                group.metadata["title"],
                base,
                optional,
                each.default,
                **each.metadata,
            )


def config_from(values: Mapping[str, Any]) -> Config:
    """Build the configuration from already checked values by option name; what is missing takes its default.

    Raises ConfigError where options contradict each other.
    """
    groups: dict[str, dict[str, Any]] = {}
    for each in options():
        if each.name in values:
            groups.setdefault(each.group, {})[each.name.replace("-", "_")] = values[each.name]
    built = {
        group.name: typing.cast(type, group.type)(**groups.get(group.name, {})) for group in dataclasses.fields(Config)
    }
    config = Config(**built)
    flat = config.flat()
    pairs = (
        ("epochs", "steps"),
        ("batch-size", "global-batch-size"),
        ("pause-after-steps", "pause-after-epochs"),
    )
    for first, second in (*pairs, ("full-batch", "batch-size"), ("full-batch", "global-batch-size")):
        if flat[first] and flat[second] is not None:
            raise ConfigError(f"--{first} and --{second}: give one of the two, not both")
    return _reconciled(config)


def _reconciled(config: Config) -> Config:
    """Return the configuration with defaults that depend on other options, or raise ConfigError for a contradiction."""
    gradients, codec, momentum = config.gradients, config.compression.compression, config.optimizer.momentum
    if config.training.precision == "fp16" and gradients.check_finite:
        raise ConfigError(
            "--check-finite: with --precision fp16 gradients overflow now and then, and those steps are skipped; a run "
            "that does not get over it stops by itself"
        )
    config.optimizer.check()
    _check_strategy(config)
    _check_selection(config)
    name = config.optimizer.optimizer.lower()
    if codec == "dgc" and momentum is None and name in _MOMENTUM:
        raise ConfigError(f"--optimizer {name}: --compression dgc has its own momentum; take sgd, or --momentum 0")
    if codec != "none" and name == "newton":
        raise ConfigError(f"--compression {codec}: a step of newton takes several exact gradients; choose none")
    if codec == "dgc" and momentum:
        raise ConfigError(f"--momentum {momentum:g}: --compression dgc has its own; set --compression-momentum instead")
    if codec == "dgc" and momentum is None and config.optimizer.optimizer.lower() == "sgd":
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, momentum=0.0))
    if config.model.model == "sparse-logistic" and momentum is None and config.optimizer.optimizer.lower() == "sgd":
        # Momentum would go on moving every feature that was ever met.
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, momentum=0.0))
    return config


def _check_strategy(config: Config) -> None:
    """Raise ConfigError for a flag that the strategy does not have, or for what it cannot be combined with."""
    options, gradients = config.strategy, config.gradients
    name = options.strategy
    if gradients.sync_batch_norm and name not in _STATISTICS:
        raise ConfigError(
            f"--sync-batch-norm: --strategy {name} has no use for it, only {', '.join(_STATISTICS)}, whose ranks step "
            f"together"
        )
    of_sync = {
        "shard-optimizer": gradients.shard_optimizer,
        "static-graph": gradients.static_graph,
        "no-find-unused-parameters": not gradients.find_unused_parameters,
    }
    for flag, given in of_sync.items():
        if given and name != "sync":
            alone = " in strategy local ranks step alone" if name == "local" else f" not {name}"
            raise ConfigError(f"--{flag}: only --strategy sync can do it;{alone}")
    flat, defaults = config.flat(), Config().flat()
    for flag, owners in BELONGS.items():
        option = flag.removeprefix("no-")
        if name not in owners and flat[option] != defaults[option]:
            raise ConfigError(f"--{flag}: --strategy {name} has no use for it, only {', '.join(owners)}")
    options.slowed_by(0)  # refuses what is not of the form R:F
    never_equal = options.asynchronous or name in ("gossip", "easgd") or (name in LOCAL and options.late > 0)
    if gradients.check_sync is not None and never_equal:
        raise ConfigError(f"--check-sync: ranks of --strategy {name} do not hold the same parameters between two steps")
    codec = config.compression.compression
    if codec == "dgc" and name in LOCAL:
        raise ConfigError(f"--compression dgc: it corrects the momentum of gradients, and {name} sends parameters")
    if codec != "none" and name in _NO_CODEC:
        raise ConfigError(f"--compression {codec}: --strategy {name} {_NO_CODEC[name]}")


def _check_selection(config: Config) -> None:
    """Raise ConfigError where what goes by evaluations, or averages the model, lacks what it needs."""
    selection = config.selection
    if selection.patience is not None and config.data.validation_fraction is None:
        raise ConfigError(
            f"--patience {selection.patience}: it goes by the validation loss; hold samples out for it with "
            f"--validation-fraction, such as 0.1"
        )
    if selection.min_delta and selection.patience is None:
        raise ConfigError(f"--min-delta {selection.min_delta:g}: it belongs to --patience, which is not set")
    if selection.ema is not None and selection.swa is not None:
        raise ConfigError(f"--ema {selection.ema:g}: --swa averages the model already; take one of the two")
    if config.probes.find_lr and config.run.resume is not None:
        raise ConfigError("--find-lr: it tries rates on a model at its start; leave out --resume")
    if config.probes.find_lr and config.training.steps == 1:
        raise ConfigError("--steps 1: --find-lr needs at least 2, one for each rate that it tries")


_MOMENTUM = ("heavy-ball", "nesterov", "lars")
_STATISTICS = ("sync", "delayed", "dmb", "server-sync")
_NO_CODEC = {
    "adasum": "combines whole gradients",
    "gossip": "averages whole models of neighbours",
    "hogwild": "sends nothing",
}


def to_toml(config: Config) -> str:
    """Return the complete configuration as TOML that `--config` reads back to an equal one.

    What is not set, and what belongs to this one run (its folders `output` and `resume`, where it pauses), stand as
    comments, so that the file can be run again.
    """
    lines: list[str] = []
    title = None
    for each, value in zip(options(), config.flat().values(), strict=True):
        if each.title != title:
            lines += ["", f"# {each.title}"]
            title = each.title
        if value is None:
            lines.append(f"# {each.name} is not set")
            continue
        line = tomli_w.dumps({each.name: value}).rstrip("\n")
        lines.append(f"# {line}" if each.name in OF_ONE_RUN else line)
    return "\n".join(lines[1:]) + "\n"
