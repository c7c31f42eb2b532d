"""SyncBatchNorm: batch normalisation by the statistics of all ranks' samples, on any device and back end.

Batch normalisation is that of Ioffe and Szegedy, ICML 2015, arXiv 1502.03167; means m_i and variances v_i of unequal
shares w_i = n_i / sum of n_j are put together as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances", COMPSTAT 1982: v = sum of w_i (v_i + (m_i − m)²), in float64, so that
nothing cancels.

For C channels on P ranks, each layer and step:
- forward: one all-reduce of a table of P rows, 8·P·(2C + 2) bytes, where each rank fills in its own row (number of
  values, whether its input needs a gradient, mean and variance of each channel) and leaves the others zero;
- backward: one all-reduce of 2C sums in the dtype of the statistics, 8C bytes for inputs in float32 or narrower; none
  where no rank's input needs a gradient.
Both block. They have a communicator of their own, so their order does not depend on when buckets of gradients are
launched. Passes over this rank's share are those of nn.BatchNorm, by the same kernels, except that on a CPU the last
one, for the gradient of the input, is three operations.

The result is exact for the sum of all ranks' losses, and the gradients of weight and bias are those by way of this
rank's samples: DistributedDataParallel's average over equal shares, where each loss is a mean, is the gradient of the
mean over all samples. For unequal shares weigh the losses, n_i·P / sum of n_j, before `backward`, not the gradients
after it (`set_gradient_weight`, `set_samples`): through the statistics a rank's gradients hold parts of the other
ranks' losses too. A rank without samples runs forward and backward on an empty input all the same; what leaves them
out (`reduce_without_backward`, `join`) leaves the other ranks waiting.

Differences from torch.nn.SyncBatchNorm: also works on CPUs and without torch.distributed; variances are exchanged, not
inverse standard deviations, in which eps hides small variances; ranks agree in the forward pass
whether the backward pass exchanges anything, so that one rank whose input needs no gradient leaves none waiting.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from allreduce_sgd.comm.base import Communicator
from allreduce_sgd.errors import MismatchError

__all__ = ["SyncBatchNorm", "close_sync_batchnorm", "convert_sync_batchnorm"]

# What a rank says of its input in the forward pass.
_NOT_RECORDED, _NO_GRADIENT, _GRADIENT = range(3)
# 1 MiB in float32: stays in a cache, and in memory that the allocator keeps.
_PIECE_NUMEL = 2**18


def convert_sync_batchnorm(module: nn.Module, comm: Communicator) -> nn.Module:
    """Make every batch normalisation in `module` a SyncBatchNorm, in place, and return the module.

    The layers stay the same objects, with their parameters, buffers, hooks, mode and state_dict keys, so optimizers
    may be made before or after. They share one new communicator, split from `comm`; layers that are SyncBatchNorm
    already are given it too, as after unpickling. All ranks must call, with the same module. `close_sync_batchnorm`
    closes the communicator again.

    Raises ValueError, with the layer's name and before anything is changed, for layers that have not seen an input yet
    (nn.LazyBatchNorm), are parametrized, or have a `forward` of their own, which would be lost.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in layers:
        _check_convertible(name, layer)
    if not layers:
        return module
    attachment = _Attachment(comm.split(0, comm.rank))
    for _, layer in layers:
        if isinstance(layer, nn.SyncBatchNorm):
            del layer.process_group
        layer.__class__ = SyncBatchNorm
        assert isinstance(layer, SyncBatchNorm)
        layer._attachment = attachment
    return module


def close_sync_batchnorm(module: nn.Module) -> None:
    """Close the communicators of the SyncBatchNorm layers in `module`, which deep copies of them share.

    Afterwards the layers work in eval mode only. All ranks must call; a second call does nothing.
    """
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm) and layer.comm is not None:
            layer.comm.close()
            layer._attachment.comm = None


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d, 2d or 3d for inputs (N, C, ...) of which every rank of `comm` has N_i samples, maybe none.

    In training mode outputs, gradients, running statistics and num_batches_tracked are those of nn.BatchNorm on the
    ranks' samples together; all ranks must call, and run the same backward passes. In eval mode nothing is exchanged:
    each rank normalises by its running statistics, or without them by those of its own samples. Statistics are in
    float32 at least. The memory format of the input is kept.

    `comm` must serve these layers alone; several may share it where all ranks call them in the same order. Deep copies
    share it. Pickling leaves it behind: call `convert_sync_batchnorm` on the unpickled model before training it.

    Raises ValueError where all ranks together have one value per channel, MismatchError where only some
    ranks record gradients, and RuntimeError for backward(create_graph=True), as an all-reduce is not differentiable.
    """

    def __init__(
        self,
        num_features: int,
        comm: Communicator | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._attachment = _Attachment(comm)

    @property
    def comm(self) -> Communicator | None:
        """The communicator of this layer; None after unpickling or closing."""
        return self._attachment.comm

    def forward(self, input: Tensor) -> Tensor:
        comm = self.comm
        if not self.training or (comm is not None and comm.size == 1):
            return super().forward(input)
        if comm is None:
            raise RuntimeError(
                "SyncBatchNorm has no communicator, as after unpickling or closing: call "
                "convert_sync_batchnorm(module, comm) on all ranks before training"
            )
        self._check_input_dim(input)
        return self._normalize(input, comm)

    # As one piece: torch.compile would trace what it can of the communicator.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _normalize(self, input: Tensor, comm: Communicator) -> Tensor:
        input = input.contiguous(memory_format=_memory_format(input))
        table = _gather(input, comm)
        said = table[:, :2].tolist()
        total = sum(count for count, _ in said)
        if total == 0:
            return super().forward(input)
        if total == 1:
            raise ValueError("SyncBatchNorm: expected more than 1 value per channel in training on all ranks together")
        reduced = _agree_on_gradients([use for _, use in said])
        if reduced and not input.requires_grad:
            # Other ranks will all-reduce in this layer's backward pass, so it must have one here too.
            input = input.detach().requires_grad_()
        mean, variance = (kind.to(_statistics_dtype(input)) for kind in _together(table, total))
        if self.track_running_stats:
            self._track(mean, variance * (total / (total - 1)))
        return _Normalize.apply(
            input, self.weight, self.bias, mean, variance, table[:, 0].int(), total, self.eps, comm if reduced else None
        )

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.size(1) != self.num_features:
            raise ValueError(
                f"SyncBatchNorm: expected an input (N, {self.num_features}, ...), got {tuple(input.shape)}"
            )


class _Attachment:
    """The communicator that layers share, also with their deep copies, and that pickling leaves behind."""

    def __init__(self, comm: Communicator | None) -> None:
        self.comm = comm

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Attachment":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Attachment, (None,)


class _Normalize(Function):
    """y = weight (x − mean) / sqrt(variance + eps) + bias, where mean and variance depend on all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        counts: Tensor,
        total: float,
        eps: float,
        comm: Communicator | None,
    ) -> Tensor:
        dtype = mean.dtype
        invstd = (variance + eps).rsqrt()
        ctx.save_for_backward(input, weight, mean, invstd, counts)
        ctx.total, ctx.comm = total, comm
        if input.numel() == 0:
            return torch.empty_like(input)
        return torch.native_batch_norm(
            input, _cast(weight, dtype), _cast(bias, dtype), mean, variance, training=False, momentum=0.0, eps=eps
        )[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) through SyncBatchNorm is not supported: its all-reduce is not itself "
                "differentiable"
            )
        input, weight, mean, invstd, counts = ctx.saved_tensors
        weight = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        grad_output = grad_output.contiguous(memory_format=_memory_format(input))
        grad_weight, grad_bias = _sums(grad_output, input, weight, mean, invstd)
        grad_input = None
        if ctx.comm is not None:
            sums = ctx.comm.all_reduce(torch.stack([grad_bias, grad_weight]), blocking=True).wait()
            if input.numel() == 0:
                grad_input = torch.empty_like(input)
            elif input.is_cuda:
                grad_input = torch.batch_norm_backward_elemt(
                    grad_output, input, mean, invstd, weight, sums[0], sums[1] / invstd, counts
                )
            else:
                grad_input = _grad_input(grad_output, input, mean, invstd, weight * invstd, sums / ctx.total)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        grads = grad_input, grad_weight if needs_weight else None, grad_bias if needs_bias else None
        return *grads, None, None, None, None, None, None


def _gather(input: Tensor, comm: Communicator) -> Tensor:
    """Return float64 rows (count, what is said of gradients, means, variances), one of each rank."""
    channels = input.size(1)
    table = torch.zeros(comm.size, 2 + 2 * channels, dtype=torch.float64, device=input.device)
    use = (_GRADIENT if input.requires_grad else _NO_GRADIENT) if torch.is_grad_enabled() else _NOT_RECORDED
    head = torch.tensor([input.numel() // channels, use], dtype=torch.float64, device=input.device)
    if input.numel():
        torch.cat([head, *_statistics(input.detach())], out=table[comm.rank])
    else:
        table[comm.rank, :2] = head
    return comm.all_reduce(table, blocking=True).wait()


def _statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's means and variances."""
    dtype, unused = _statistics_dtype(input), None
    if input.dtype is not dtype:
        # Torch's kernel takes the dtype of its results from running statistics, which are not used otherwise.
        unused = torch.zeros(input.size(1), dtype=dtype, device=input.device)
    return torch.batch_norm_update_stats(input, unused, unused, 0.0)


def _together(table: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """Return the means and variances over all ranks' samples (Chan et al.) from the ranks' own."""
    shares = table[:, :1] / total
    means, variances = table[:, 2:].chunk(2, dim=1)
    mean = (shares * means).sum(0)
    distances = means - mean
    return mean, (shares * torch.addcmul(variances, distances, distances)).sum(0)


def _agree_on_gradients(uses: list[float]) -> bool:
    """Say whether some rank's input needs a gradient, in which case all ranks must take part in the backward pass."""
    needed = _GRADIENT in uses
    if needed and _NOT_RECORDED in uses:
        ranks = ", ".join(str(rank) for rank, use in enumerate(uses) if use == _NOT_RECORDED)
        raise MismatchError(f"SyncBatchNorm: no gradients are recorded (no_grad) on rank {ranks}, but on other ranks")
    return needed


def _sums(grad_output: Tensor, input: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's sums of dy·(x − mean)·invstd and of dy: the gradients of weight and bias."""
    if input.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward.default(
        grad_output, input, weight, None, None, mean, invstd, True, 0.0, [False, True, True]
    )
    return grad_weight, grad_bias


def _grad_input(
    grad_output: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, scale: Tensor, means: Tensor
) -> Tensor:
    """Return scale · (dy − means[0] − means[1] · normalised x), where `means` are those of dy and of dy · normalised x.

    Half-precision tensors are widened a piece at a time, which spares their copies as a whole.
    """
    shape = (1, -1) + (1,) * (input.dim() - 2)
    constant, slope = means * -scale
    mean, scale, constant, slope = (vector.view(shape) for vector in (mean, scale, constant, slope * invstd))

    def combine(grad_output: Tensor, input: Tensor) -> Tensor:
        # The mean is taken away first: where it is large against the deviations, a folded constant would cancel.
        result = input - mean
        return torch.addcmul(constant, result, slope, out=result).addcmul_(grad_output, scale)

    if input.dtype is mean.dtype:
        return combine(grad_output, input)
    grad_input = torch.empty_like(input)
    samples = max(1, _PIECE_NUMEL // input[0].numel())
    for out, *piece in zip(*(tensor.split(samples) for tensor in (grad_input, grad_output, input)), strict=True):
        out.copy_(combine(*(tensor.to(mean.dtype) for tensor in piece)))
    return grad_input


def _memory_format(tensor: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.dim(), torch.contiguous_format)
    kept = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=wanted)
    return wanted if kept else torch.contiguous_format


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype is torch.float64 else torch.float32


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def _check_convertible(name: str, layer: _BatchNorm) -> None:
    kind = type(layer)
    if isinstance(layer, LazyModuleMixin):
        why = "it has not seen an input yet, so its shape is unknown; run a forward pass first"
    elif is_parametrized(layer):
        why = "it is parametrized; remove the parametrizations first"
    elif kind.forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward):
        why = "its forward is not that of nn.BatchNorm and would be lost"
    else:
        return
    raise ValueError(f"convert_sync_batchnorm: layer {name!r}, a {kind.__name__}, cannot be converted: {why}")
