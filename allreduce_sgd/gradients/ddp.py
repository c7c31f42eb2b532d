"""DistributedDataParallel: wraps a module so that backward passes leave every rank with the average gradient.

The names and meaning are those of torch.nn.parallel.DistributedDataParallel; the communicator is passed in. What is
reduced when, and which copies are made, is told in `reducer.py`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.compression.base import CodecFactory
from allreduce_sgd.gradients.buckets import Bucket, BucketMemory
from allreduce_sgd.gradients.clipping import BucketNorms, clip_factor, clip_grad_norm_, lie_in
from allreduce_sgd.gradients.comm_hook import CommHook, Hooked
from allreduce_sgd.gradients.exchange import AllReduce, Compressed, Exchange
from allreduce_sgd.gradients.join import Joining, joined
from allreduce_sgd.gradients.reducer import Reducer
from allreduce_sgd.gradients.replicate import average_buffers as take_average
from allreduce_sgd.gradients.replicate import broadcast_tensors, check_same_model
from allreduce_sgd.gradients.shards import ReduceScatter, ShardedParameters

__all__ = ["DistributedDataParallel"]


class DistributedDataParallel(nn.Module):
    """Data-parallel wrapper of `module`, whose parameters and buffers become those of rank 0.

    All ranks must construct it together, with the same model; a parameter that differs in name, shape, strides, dtype
    or requires_grad raises MismatchError with its name and the ranks. Afterwards all ranks must run the same number of
    synchronised backward passes.

    `bucket_mb` and `first_bucket_mb` are bucket sizes in MiB. `broadcast_buffers`: each forward pass in training mode
    first takes the buffers of rank 0, as torch does; `average_buffers` takes the average of all ranks' instead; with
    both False every rank keeps its own.

    Parameters that get no gradient are found without tracing, at no cost; `find_unused_parameters=False` makes them an
    error, to find mistakes. `static_graph` promises that every pass uses the same parameters equally often, so that
    buckets do not wait for those that never come, and parameters may get several gradients in one pass (re-entrant
    checkpointing of shared ones). `check_finite`: a NaN or Inf in any rank's gradient raises NonFiniteError on all,
    naming parameters and ranks; costs one pass over each bucket. `compression` makes the codec of a bucket. Buckets of
    `reduce_dtype` sum narrower gradients in that dtype (at the cost of a copy back); without it bfloat16 and float16
    are accumulated in float32 too, but rounded before and after.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        *,
        bucket_mb: float = 25.0,
        first_bucket_mb: float = 1.0,
        broadcast_buffers: bool = True,
        average_buffers: bool = False,
        find_unused_parameters: bool = True,
        static_graph: bool = False,
        check_finite: bool = False,
        compression: CodecFactory | None = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.comm: Communicator | None = None
        self.bucket_mb, self.first_bucket_mb = bucket_mb, first_bucket_mb
        self.broadcast_buffers, self.average_buffers = broadcast_buffers, average_buffers
        self.find_unused_parameters, self.static_graph, self.check_finite = (
            find_unused_parameters,
            static_graph,
            check_finite,
        )
        self.compression = compression
        self.reduce_dtype = reduce_dtype
        self._norms: BucketNorms | None = None
        self._sharded: ShardedParameters | None = None
        self.cleared = 0
        self._detach()
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError("DistributedDataParallel: the module has no parameter that requires a gradient")
        self.attach(comm)

    def attach(self, comm: Communicator) -> None:
        """Synchronise over `comm` from now on: what is left to do after unpickling. All ranks must call."""
        self.comm = comm
        self._memory = BucketMemory(comm)
        if comm.size == 1 and not self.check_finite:
            return
        check_same_model(self.module, comm)
        broadcast_tensors([*self.module.parameters(), *self.module.buffers()], comm)
        self._reduce_by(AllReduce(comm) if self.compression is None else Compressed(comm, self.compression))

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        reducer = self._reducer
        if reducer is None or not (self.training and torch.is_grad_enabled()):
            if self.comm is None and self.training:
                raise RuntimeError("DistributedDataParallel: unpickled without a communicator; attach(comm) first")
            return self.module(*inputs, **named_inputs)
        reducer.before_forward()
        self._follow_parameters(reducer)
        if self.joining is not None:
            self.joining.announce(True, self._synchronised)
        if self._synchronised:
            self.follow_buffers()
        outputs = self.module(*inputs, **named_inputs)
        if self._synchronised:
            for output in [outputs] if isinstance(outputs, Tensor) else tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    # The outermost backward pass comes through here first; parameters may be met in passes within it.
                    output.register_hook(_beginning(reducer))
        return outputs

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this context backward passes accumulate locally; the first one after it reduces the sums."""
        before = self._synchronised
        self._switch(False)
        try:
            yield
        finally:
            self._switch(before)

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
        weight_by_samples: bool = False,
    ) -> AbstractContextManager[None]:
        """Return a context for a training loop that some ranks leave earlier than others, as torch's `join`.

        A gradient is divided by the number of all ranks, or (`divide_by_initial_world_size=False`) of those that still
        have input; with `weight_by_samples` it is the true mean over the samples of all ranks, of which each tells how
        many it has by `set_samples` before every forward pass. At the end all ranks have the model of the last ones.
        All ranks must enter; one backward pass for each forward pass.
        """
        if not enable or self._reducer is None:
            return nullcontext()
        return joined(self, divide_by_initial_world_size, throw_on_early_termination, weight_by_samples)

    def set_gradient_weight(self, weight: float) -> None:
        """Have the coming backward passes weigh this rank's gradient by `weight`; 1/size, the default, averages.

        With weight n_i / sum of n_i, where rank i's loss is the mean over n_i samples, the result is the true mean
        over all samples of all ranks. On one rank the weight must be 1.
        """
        if self._reducer is not None:
            self._reducer.weight = weight
        elif weight != 1.0:
            raise ValueError(f"set_gradient_weight: one rank alone has weight 1, not {weight}")

    def set_samples(self, samples: int) -> None:
        """Have the next synchronised backward pass weigh this rank's gradient by its part of all ranks' samples.

        All ranks must call. Within `join(weight_by_samples=True)` before every forward pass.
        """
        if self.joining is not None:
            self.joining.samples = samples
        elif self._reducer is not None and self.comm is not None:
            everyone = int(self.comm.all_reduce(torch.tensor([samples]), blocking=True).wait())
            self._reducer.weigh_next(samples / everyone if everyone else 0.0)

    def reduce_without_backward(self) -> None:
        """Take part in this step's reductions with what `.grad` holds now, zeros where it is None.

        For a rank without samples, while the other ranks run one forward and one synchronised backward pass.
        """
        if self._reducer is not None:
            self._follow_parameters(self._reducer)
            self.follow_buffers()
            self._reducer.reduce_now()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, *, untouched: bool = False) -> Tensor:
        """Scale the gradients in place so that their global norm is at most `max_norm`; returns the norm they had.

        `untouched` promises that nobody has changed the gradients since the backward pass, not even a loss scaler:
        then, from the second call on, the norm is made of those of the buckets, taken while later ones were in flight.
        """
        parameters = list(self.module.parameters())
        reducer = self._reducer
        if reducer is None or self._exchange is None or not self._exchange.whole:
            return clip_grad_norm_(parameters, max_norm, norm_type)
        if untouched and (self._norms is None or self._norms.norm_type != norm_type):
            self._norms = BucketNorms(norm_type)
            reducer.after_bucket = self._norms.measure
        norms = self._norms if untouched and self._norms is not None else BucketNorms(norm_type)
        norm = norms.total(reducer.buckets) if lie_in(reducer.buckets, parameters) else None
        if norm is None:
            return clip_grad_norm_(parameters, max_norm, norm_type)
        factor = clip_factor(norm, max_norm)
        for bucket in reducer.buckets:
            bucket.buffer.mul_(factor.to(bucket.buffer.device))
        return norm

    def register_comm_hook(self, state: Any, hook: CommHook) -> None:
        """Reduce buckets by `hook(state, bucket)` from now on. All ranks must call, before the first backward pass."""
        if not callable(hook):
            raise TypeError(f"register_comm_hook: {hook!r} cannot be called")
        if self.compression is not None:
            raise RuntimeError("register_comm_hook: buckets are compressed already; choose one of the two")
        if self.comm is None:
            raise RuntimeError("register_comm_hook: attach(comm) first")
        if isinstance(self._exchange, Hooked):
            raise RuntimeError("register_comm_hook: there is a hook already")
        self._reduce_by(Hooked(self.comm, state, hook))

    def watch_buckets(self, observe: Callable[[Bucket], None] | None) -> None:
        """Have `observe` called with every bucket just before it is reduced; it must not change it. None ends that."""
        if self._reducer is not None:
            self._reducer.before_bucket = observe

    def bucket_bytes(self) -> list[int]:
        """Return the sizes of the buckets in the order in which they are reduced; none on one rank alone."""
        return [] if self._reducer is None else [bucket.buffer.nbytes for bucket in self._reducer.buckets]

    def bucket_order(self) -> list[int] | None:
        """Return the order of parameters, by index, in which buckets were filled; None as long as it is the default."""
        return None if self._reducer is None else self._reducer.order

    def set_bucket_order(self, order: list[int] | None) -> None:
        """Fill the buckets in this order: that of another run, so that sums round alike. All ranks must call."""
        if self._reducer is not None and order is not None:
            self._reducer.set_order(order)

    def codec_state_dict(self) -> list[dict[str, Any]]:
        """Return what this rank's codecs keep (residuals), for each bucket; empty without compression."""
        return [codec.state_dict() for codec in self._codecs()]

    def load_codec_state_dict(self, states: list[Mapping[str, Any]]) -> None:
        """Go on from `codec_state_dict`."""
        codecs = self._codecs()
        if len(states) != len(codecs):
            raise ValueError(f"load_codec_state_dict: {len(states)} states for {len(codecs)} buckets")
        for codec, state in zip(codecs, states, strict=True):
            codec.load_state_dict(state)

    def rescale_codecs(self, factor: float) -> None:
        """Multiply what the codecs keep by `factor`, as gradients will be from now on (a new loss scale)."""
        for codec in self._codecs():
            codec.rescale_(factor)

    def shard(self, whole: bool, shared: bool) -> ShardedParameters | None:
        """Reduce for a sharded optimizer from now on; None on one rank alone. All ranks must call. See `sharded.py`."""
        if self._reducer is None or self.comm is None:
            return None
        sparse = [member.name for member in self._reducer.members if member.bucket is None]
        if sparse:
            raise ValueError(f"ShardedOptimizer: the gradient of {sparse[0]!r} is sparse; use an optimizer of its own")
        if not whole and isinstance(self._exchange, AllReduce):
            self._reduce_by(ReduceScatter(self.comm))
        elif whole and isinstance(self._exchange, ReduceScatter):
            self._reduce_by(AllReduce(self.comm))
        self._reducer.set_order(None)
        if any(len({one.dtype for one in bucket.parameters}) > 1 for bucket in self._reducer.buckets):
            raise ValueError("ShardedOptimizer: reduce_dtype would mix dtypes of parameters in a bucket; leave it out")
        self._sharded = ShardedParameters(self._reducer.buckets, self.comm, whole, shared)
        return self._sharded

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.cleared = self.passes

    @property
    def passes(self) -> int:
        """How many synchronised backward passes there have been."""
        return 0 if self._reducer is None else self._reducer.passes

    def unused_parameters(self) -> set[int]:
        """Return the identities of the parameters that no rank had a gradient of in the last pass."""
        return set() if self._reducer is None else self._reducer.unused

    def layout_changed(self, layout: ShardedParameters) -> bool:
        """Say whether buckets have been cut anew, or parameters been moved, since `shard` returned this layout."""
        return self._reducer is None or self._reducer.buckets is not layout.gradients or self._sharded is not layout

    def follow_buffers(self) -> None:
        """Make the buffers what the options say, in training mode. All ranks must call."""
        if self._has_buffers and self.training and self.comm is not None:
            present = None if self.joining is None else self.joining.present
            if self.average_buffers:
                take_average(self.module, self.comm, present)
            elif self.broadcast_buffers:
                broadcast_tensors(self.module.buffers(), self.comm, 0 if present is None else present[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistributedDataParallel":
        """Return a working wrapper of a copy of the module, over the same communicator. All ranks must call."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        twin._detach()
        if self.comm is not None:
            twin.attach(self.comm)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        left_out = {
            "comm",
            "joining",
            "_reducer",
            "_exchange",
            "_norms",
            "_memory",
            "_sharded",
            "_everyone",
            "_trained",
        }
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._detach()

    def _detach(self) -> None:
        self.comm = None
        self.joining: Joining | None = None
        self._synchronised = True
        self._reducer: Reducer | None = None
        self._exchange: Exchange | None = None
        self._norms = None
        self._sharded = None
        self._everyone: list[nn.Parameter] = []
        self._trained: list[bool] = []
        self._has_buffers = any(True for _ in self.module.buffers())

    def _reduce_by(self, exchange: Exchange) -> None:
        assert self.comm is not None
        before, self._reducer = self._reducer, None
        if before is not None:
            before.close()
        self.cleared = 0
        self._norms = None
        self._exchange = exchange
        self._everyone = list(self.module.parameters())
        self._trained = [parameter.requires_grad for parameter in self._everyone]
        sparse = [
            layer.weight
            for layer in self.module.modules()
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse
        ]
        self._reducer = Reducer(
            self._named(),
            self.comm,
            self._memory,
            exchange,
            self.first_bucket_mb * 2**20,
            self.bucket_mb * 2**20,
            self.find_unused_parameters,
            self.static_graph,
            self.check_finite,
            self.reduce_dtype,
            sparse,
        )

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, one) for name, one in self.module.named_parameters() if one.requires_grad]

    def _follow_parameters(self, reducer: Reducer) -> None:
        """Notice parameters that were frozen or unfrozen since the last pass."""
        trained = [parameter.requires_grad for parameter in self._everyone]
        if trained != self._trained and self.comm is not None:
            check_same_model(self.module, self.comm)
            self._everyone = list(self.module.parameters())
            self._trained = [parameter.requires_grad for parameter in self._everyone]
            reducer.follow(self._named())

    def _codecs(self) -> list[Any]:
        return self._exchange.codecs if isinstance(self._exchange, Compressed) else []

    def _switch(self, synchronised: bool) -> None:
        self._synchronised = synchronised
        if self._reducer is not None:
            self._reducer.enabled = synchronised


def _beginning(reducer: Reducer) -> Callable[[Tensor], None]:
    alive = reducer.alive

    def hook(gradient: Tensor) -> None:
        present = alive()
        if present is not None:
            present.begin_pass()

    return hook
