"""What a run tells of itself: lines of metrics.jsonl, what a person watching sees, and the summary."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allreduce_sgd.config import Config
from allreduce_sgd.display import Display, number
from allreduce_sgd.gradients.replicate import common_sha256
from allreduce_sgd.metrics import MetricsLog, Totals
from allreduce_sgd.progress import Position
from allreduce_sgd.stopwatch import Stopwatch
from allreduce_sgd.strategies.base import Strategy

__all__ = ["Evaluation", "Report"]


@dataclass(frozen=True)
class Evaluation:
    """The model on the whole test set, and the validation set if there is one: exact sums over all ranks, nothing
    padded."""

    step: int
    test_loss: float
    test_accuracy: float | None
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class Report:
    """Tells of the training of `strategy`; `log` is rank 0's, None elsewhere or for no log. Every rank has one."""

    def __init__(self, strategy: Strategy, watch: Stopwatch, log: MetricsLog | None) -> None:
        self._strategy = strategy
        self._watch = watch
        self._log = log
        self._told_seconds = 0.0

    def begin(self) -> None:
        """Be told that training starts or goes on now."""
        self._told_seconds = self._watch.train_seconds

    def training(self, at: Position, totals: Totals, sums: Mapping[str, float], display: Display) -> None:
        """Tell of the steps since this was called last: their totals, and the strategy's measures summed over ranks."""
        seconds = self._watch.train_seconds
        speed = totals.samples / max(seconds - self._told_seconds, 1e-9)
        self._told_seconds = seconds
        display.figures(at.step, totals.mean_loss, totals.accuracy, speed)
        values = {
            "loss": totals.mean_loss,
            "accuracy": totals.accuracy,
            "learning_rate": self._strategy.optimizer.param_groups[0]["lr"],
            "samples_per_second": speed,
            **self._watch.communication(),
            "communication": self._watch.causes(),
            **self._strategy.figures(sums),
        }
        if self._strategy.scaling is not None:
            scaling = self._strategy.scaling
            values |= {"loss_scale": scaling.scale, "skipped_steps": scaling.skipped_steps}
        self._write("train", at, values)

    def evaluation(
        self, at: Position, evaluation: Evaluation, train_loss: float | None, display: Display | None
    ) -> None:
        """Tell of an evaluation; `display` None: only in metrics.jsonl."""
        values = {"test_loss": evaluation.test_loss, "test_accuracy": evaluation.test_accuracy}
        validated = evaluation.validation_loss is not None
        if validated:
            values["validation_loss"] = evaluation.validation_loss
            values["validation_accuracy"] = evaluation.validation_accuracy
        self._write("evaluation", at, values)
        if display is not None:
            of_validation = _figures("validation", evaluation.validation_loss, evaluation.validation_accuracy)
            display.line(
                f"step {at.step:6d}   epoch {at.epoch:7.2f}   train loss {number(train_loss)}   "
                f"{of_validation if validated else ''}"
                f"{_figures('test', evaluation.test_loss, evaluation.test_accuracy)}"
                f"{self._watch.train_seconds:8.2f} s"
            )

    def summary(
        self,
        at: Position,
        config: Config,
        evaluation: Evaluation,
        conclusions: Mapping[str, Any],
        train_loss: float | None,
        global_batch_size: int,
    ) -> dict[str, Any]:
        """Return what summary.json has. All ranks that train must call, with the final model; `evaluation` is its."""
        strategy, comm = self._strategy, self._strategy.comm
        communication = self._watch.average_over_ranks()
        train_seconds = self._watch.train_seconds
        return {
            "world_size": strategy.everyone.size,
            "workers": comm.size,
            "servers": strategy.servers,
            "strategy": strategy.name,
            "consensus": strategy.consensus_kind,
            "backend": comm.backend,
            "algorithm": comm.algorithm,
            "steps": at.step,
            "sharded_optimizer": strategy.sharded is not None,
            "skipped_steps": strategy.skipped_steps(),
            "epochs": at.epoch,
            "samples": at.samples,
            "global_batch_size": global_batch_size,
            "train_loss": train_loss,
            "test_loss": evaluation.test_loss,
            "test_accuracy": evaluation.test_accuracy,
            "validation_loss": evaluation.validation_loss,
            "validation_accuracy": evaluation.validation_accuracy,
            **conclusions,
            "train_seconds": train_seconds,
            "wall_seconds": self._watch.wall_seconds,
            "samples_per_second": at.samples / max(train_seconds, 1e-9),
            **communication,
            **strategy.summary(),
            "seed": config.training.seed,
            "parameters_sha256": common_sha256(strategy.model, comm),
        }

    def _write(self, event: str, at: Position, values: dict[str, Any]) -> None:
        if self._log is not None:
            times = {"train_seconds": self._watch.train_seconds, "wall_seconds": self._watch.wall_seconds}
            self._log.write(event, at.step, {"epoch": at.epoch, "samples": at.samples, **values, **times})


def _figures(split: str, loss: float | None, accuracy: float | None) -> str:
    told = "" if accuracy is None else f"{split} accuracy {100 * accuracy:6.2f} %   "
    return f"{split} loss {number(loss)}   {told}"
