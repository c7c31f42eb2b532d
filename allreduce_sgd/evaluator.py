"""Evaluations of a run, and what follows from them: a target that is reached, an early end, and the best model.

Targets are those of the test set; early stopping goes by the validation set, so that the test set tells how good the
model is that it chose. All ranks have the same figures, bit for bit, and so draw the same conclusions.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allreduce_sgd.checkpoint import save_model
from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.config import Config
from allreduce_sgd.data.split import Samples
from allreduce_sgd.errors import located
from allreduce_sgd.feed import Feed
from allreduce_sgd.metrics import Totals
from allreduce_sgd.report import Evaluation
from allreduce_sgd.selection.early_stopping import EarlyStopping
from allreduce_sgd.selection.final_model import FinalModel
from allreduce_sgd.selection.kept_model import KeptModel

__all__ = ["Evaluator"]


class Evaluator:
    """Evaluates `final`'s model on the splits of `feed`'s data set; `folder` is the run's, None for no files.

    All ranks that train must call its methods together. `last` is the evaluation made last.
    """

    def __init__(
        self,
        config: Config,
        comm: Communicator,
        feed: Feed,
        final: FinalModel,
        folder: Path | None,
        virtual_ranks: int | None,
    ) -> None:
        self.last: Evaluation | None = None
        self.reached_target = False
        self._config = config
        self._comm = comm
        self._feed = feed
        self._final = final
        self._folder = folder
        self._virtual_ranks = virtual_ranks or 1
        selection = config.selection
        self._stopping = None
        if selection.patience is not None:
            self._stopping = EarlyStopping(selection.patience, selection.min_delta)
        self._best: Evaluation | None = None
        self._best_model = KeptModel(comm, None if folder is None else folder / "best.pt")

    @property
    def stopped_early(self) -> bool:
        return self._stopping is not None and self._stopping.stop

    def evaluate(self, step: int) -> Evaluation:
        """Evaluate the model after so many steps, and draw the conclusions."""
        model, validation = self._final.strategy.model, self._feed.dataset.validation
        with (
            located(f"evaluation after step {step}"),
            self._final.strategy.everyone.traffic.attributed("evaluation"),
            self._comm.traffic.attributed("evaluation"),
            self._final.consensus(),
        ):
            test = self._totals(self._feed.dataset.test)
            validated = None if validation is None else self._totals(validation)
            self.last = Evaluation(
                step,
                _loss(test),
                test.accuracy,
                None if validated is None else _loss(validated),
                None if validated is None else validated.accuracy,
            )
            self.reached_target |= self._reaches_target(self.last)
            if self._is_best(self.last):
                self._best = self.last
                self._best_model.keep(model, asdict(self._best))
        return self.last

    def finish(self) -> Evaluation:
        """Leave the strategy's model with the final one for good, and return its evaluation: the end of training.

        With early stopping that is the best one, unless a target was reached, which ended the run with the last.
        """
        assert self.last is not None
        self._final.finish()
        model = self._final.strategy.model
        if self._best is not None and not self.reached_target:
            self._best_model.install(model)
            return self._best
        selection = self._config.selection
        averaged = selection.ema is not None or selection.swa is not None
        if averaged and self._folder is not None and self._comm.rank == 0:
            values = {name: value.detach().cpu() for name, value in model.state_dict().items()}
            save_model(self._folder / "averaged.pt", values, asdict(self.last))
        return self.last

    def conclusions(self) -> dict[str, Any]:
        """Return what summary.json has of them, once training has ended."""
        kept = self._best if self._best is not None and not self.reached_target else self.last
        return {
            "final_model": self._final.kind,
            "best_step": None if kept is None or self._stopping is None else kept.step,
            "stopped_early": self.stopped_early,
            "target_accuracy": self._config.training.target_accuracy,
            "target_loss": self._config.training.target_loss,
            "reached_target": self.reached_target,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks share; the best model on rank 0 only."""
        return {
            "last": None if self.last is None else asdict(self.last),
            "best": None if self._best is None else asdict(self._best),
            "best_model": self._best_model.state_dict(),
            "stopping": None if self._stopping is None else self._stopping.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, by the present options: a resumed run may have another target or patience."""
        if state["last"] is not None:
            self.last = Evaluation(**state["last"])
            self.reached_target = self._reaches_target(self.last)
        if self._stopping is not None and state["stopping"] is not None:
            self._stopping.load_state_dict(state["stopping"])
            if state["best"] is not None:
                self._best = Evaluation(**state["best"])
                self._best_model.load_state_dict(state["best_model"], state["best"])

    def _is_best(self, evaluation: Evaluation) -> bool:
        if self._stopping is None or evaluation.validation_loss is None:
            return False
        # The first is kept whatever it is, so that there is one.
        return self._stopping.look(evaluation.validation_loss) or self._best is None

    def _totals(self, samples: Samples) -> Totals:
        model, comm = self._final.strategy.model, self._comm
        tally = self._feed.evaluate(model, comm.rank, comm.size, self._virtual_ranks, samples)
        totals, _ = tally.reduce(comm)
        return totals

    def _reaches_target(self, evaluation: Evaluation) -> bool:
        accuracy, loss = self._config.training.target_accuracy, self._config.training.target_loss
        accurate = accuracy is not None and (evaluation.test_accuracy or 0.0) >= accuracy
        return accurate or (loss is not None and evaluation.test_loss <= loss)


def _loss(totals: Totals) -> float:
    return float("nan") if totals.mean_loss is None else totals.mean_loss
