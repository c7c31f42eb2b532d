"""Delayed SGD: the sum of a step's gradients is applied some steps later, and is in flight until then.

Langford, Smola and Zinkevich, "Slow learners are fast", NIPS 2009, arXiv 0911.0491: w_{t+1} = w_t - eta g(w_{t-tau}).
Signal: the gradient; H = 1; delay tau; exchange: all-reduce, or what a codec makes of it; outer step: the optimizer.
The sum of step t's gradients travels while those of the steps t+1 to t+tau are computed, so that it costs no time as
long as it takes less than tau of them. Bytes per rank and step: those of an all-reduce of the gradients, 2(P-1)/P n
with the ring. tau = 0 is synchronous SGD.

On a quadratic of curvature l it is stable for eta l < 2 sin(pi / (2 (2 tau + 1))): 2, 1, 0.618 for tau = 0, 1, 2.

The first tau steps have nothing to apply yet. The last tau sums are applied at the end, with the learning rate and the
loss scale of then, so that every gradient counts once; the consensus model too has all outstanding sums applied, which
takes a copy of parameters, optimizer state and sums while it is evaluated. A run that goes on with another number of
ranks goes on from there, and has nothing to apply in its first tau steps again.

Differences from the paper: gradients are averages over ranks, one gradient a rank and step, instead of those of workers
that take turns; and the optimizer is any that takes gradients, momentum and clipping included.
"""

from allreduce_sgd.strategies.base import Share
from allreduce_sgd.strategies.late import Late

__all__ = ["Delayed"]


class Delayed(Late):
    """Applies gradients `delay` steps late."""

    name = "delayed"
    consensus_kind = "every rank's model (equal on all), with all outstanding gradients applied"

    def meanwhile(self, share: Share) -> None:
        pass
