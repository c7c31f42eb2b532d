"""SyncBatchNorm against nn.BatchNorm on the samples of all ranks together."""

import copy
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from allreduce_sgd import DistributedDataParallel, SyncBatchNorm, convert_sync_batchnorm
from allreduce_sgd.comm.base import Communicator, ReduceOp, Work
from allreduce_sgd.errors import MismatchError
from allreduce_sgd.gradients.sync_batch_norm import close_sync_batchnorm

CHANNELS = 3
# The shape of one sample's channel, and the layer for it.
KINDS: dict[str, tuple[tuple[int, ...], type[nn.Module]]] = {
    "features": ((), nn.BatchNorm1d),
    "1d": ((5,), nn.BatchNorm1d),
    "2d": ((4, 3), nn.BatchNorm2d),
    "3d": ((2, 3, 2), nn.BatchNorm3d),
}
SHARES = ["equal", "uneven", "empty"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture
def layers() -> Iterator[list[nn.Module]]:
    """Modules whose communicators are to be closed after the test."""
    made: list[nn.Module] = []
    yield made
    for module in made:
        close_sync_batchnorm(module)


def counts_of(comm: Communicator, shares: str) -> list[int]:
    if shares == "equal":
        return [4] * comm.size
    # On one rank an empty share would be an empty batch.
    least = 1 if shares == "uneven" or comm.size == 1 else 0
    return [least + 3 * rank for rank in range(comm.size)] if comm.size > 1 else [4]


def parts(counts: list[int], shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Every rank's samples, with means and spreads that differ between ranks and channels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rank, count in enumerate(counts):
        part = torch.randn(count, CHANNELS, *shape, generator=generator, dtype=torch.float64)
        offsets = torch.arange(CHANNELS, dtype=torch.float64).view(1, -1, *[1] * len(shape))
        made.append(part * (1 + rank) + offsets + 2 * rank)
    return made


def layer_for(kind: str, **options: Any) -> nn.Module:
    layer = KINDS[kind][1](CHANNELS, **options).double()
    with torch.no_grad():
        for offset, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.linspace(-0.5, 1.5, CHANNELS) + offset)
    return layer


def converted(module: nn.Module, comm: Communicator, made: list[nn.Module]) -> nn.Module:
    module = convert_sync_batchnorm(module, comm)
    made.append(module)
    return module


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def summed(comm: Communicator, tensor: Tensor) -> Tensor:
    return comm.all_reduce(tensor.clone()).wait()


def assert_like_one_batch(
    comm: Communicator, layer: nn.Module, reference: nn.Module, counts: list[int], shape: tuple[int, ...], **to: Any
) -> None:
    """Run both layers on a few batches; compare what comes out, what goes back, and what they keep."""
    for step in range(3):
        batch = [part.to(**to) for part in parts(counts, shape, seed=step)]
        factors = [part.to(**to) for part in parts(counts, shape, seed=50 + step)]
        everything = torch.cat(batch).requires_grad_()
        mine = batch[comm.rank].clone().requires_grad_()
        layer.zero_grad()
        reference.zero_grad()
        wanted = reference(everything)
        got = layer(mine)
        (wanted * torch.cat(factors)).sum().backward()
        (got * factors[comm.rank]).sum().backward()
        close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
        close(got, wanted.split(counts)[comm.rank])
        close(gradient(mine), gradient(everything).split(counts)[comm.rank])
        for parameter, other in zip(layer.parameters(), reference.parameters(), strict=True):
            close(summed(comm, gradient(parameter)), gradient(other))
        for name, buffer in reference.named_buffers():
            close(layer.get_buffer(name), buffer)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_big_batch(
    comm: Communicator, layers: list[nn.Module], device: torch.device, kind: str, shares: str
) -> None:
    reference = layer_for(kind).to(device)
    layer = converted(copy.deepcopy(reference), comm, layers)
    assert_like_one_batch(comm, layer, reference, counts_of(comm, shares), KINDS[kind][0], device=device)


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.3},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_options(comm: Communicator, layers: list[nn.Module], options: dict[str, Any]) -> None:
    reference = layer_for("2d", **options)
    layer = converted(copy.deepcopy(reference), comm, layers)
    assert_like_one_batch(comm, layer, reference, counts_of(comm, "uneven"), KINDS["2d"][0])


@pytest.mark.parametrize("shares", SHARES)
def test_every_back_end(any_comm: Communicator, layers: list[nn.Module], shares: str) -> None:
    reference = layer_for("1d")
    layer = converted(copy.deepcopy(reference), any_comm, layers)
    assert_like_one_batch(any_comm, layer, reference, counts_of(any_comm, shares), KINDS["1d"][0])
    # Those of Gloo end with the default group that its communicator closes.
    close_sync_batchnorm(layer)


def test_layer_made_directly(comm: Communicator) -> None:
    own = comm.split(0, comm.rank)
    reference = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.2, dtype=torch.float64)
    layer = SyncBatchNorm(CHANNELS, own, eps=1e-3, momentum=0.2, dtype=torch.float64)
    assert_like_one_batch(comm, layer, reference, counts_of(comm, "uneven"), KINDS["2d"][0])
    own.close()


def test_one_rank_alone_has_the_bits_of_batch_norm(comm: Communicator, layers: list[nn.Module]) -> None:
    if comm.size > 1:
        pytest.skip("one rank")
    reference = layer_for("2d").float()
    layer = converted(copy.deepcopy(reference), comm, layers)
    batch = parts([6], (4, 3))[0].float()
    inputs = [batch.clone().requires_grad_() for _ in range(2)]
    outputs = [module(data) for module, data in zip((layer, reference), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(gradient(inputs[0]), gradient(inputs[1]))
    for mine, other in zip(layer.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_format_is_kept(
    comm: Communicator,
    layers: list[nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    layer = converted(nn.BatchNorm2d(CHANNELS).to(device), comm, layers)
    batch = parts([4] * comm.size, (4, 3))[comm.rank].to(device, dtype).contiguous(memory_format=memory_format)
    batch.requires_grad_()
    output = layer(batch)
    # A gradient of the other format, and expanded: both are what autograd may pass on.
    output.sum().backward()
    layer(batch).mul(torch.ones(4, CHANNELS, 4, 3, device=device)).sum().backward()
    assert output.is_contiguous(memory_format=memory_format)
    assert gradient(batch).is_contiguous(memory_format=memory_format)


def test_input_that_is_not_contiguous(comm: Communicator, layers: list[nn.Module]) -> None:
    reference = layer_for("1d")
    layer = converted(copy.deepcopy(reference), comm, layers)
    batch = parts([4] * comm.size, (5,))
    mine = batch[comm.rank].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    everything = torch.cat(batch).requires_grad_()
    layer(mine).square().sum().backward()
    reference(everything).square().sum().backward()
    torch.testing.assert_close(gradient(mine), gradient(everything).split(4)[comm.rank])


@pytest.mark.parametrize(
    ("dtype", "offset", "rtol"), [(torch.float32, 0.0, 1e-6), (torch.float32, 1e4, 1e-3), (torch.float64, 1e7, 1e-8)]
)
def test_small_variance_around_a_large_mean(
    comm: Communicator, layers: list[nn.Module], dtype: torch.dtype, offset: float, rtol: float
) -> None:
    # E[x²] − E[x]² would be off by 10 and by 1e-2 in the last two; a mean of that size is itself rounded by rtol / 10.
    batch = [(part + offset).to(dtype) for part in parts(counts_of(comm, "uneven"), (40, 40))]
    layer = converted(nn.BatchNorm2d(CHANNELS, momentum=1.0, dtype=dtype), comm, layers)
    layer(batch[comm.rank])
    exact = torch.cat(batch).double().transpose(0, 1).flatten(1)
    exact_mean = exact.mean(1)
    exact_variance = (exact - exact_mean.unsqueeze(1)).square().sum(1) / (exact.size(1) - 1)
    torch.testing.assert_close(layer.get_buffer("running_var").double(), exact_variance, rtol=rtol, atol=0.0)
    torch.testing.assert_close(layer.get_buffer("running_mean").double(), exact_mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("narrow_layer", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_has_statistics_in_float32(
    comm: Communicator, layers: list[nn.Module], device: torch.device, dtype: torch.dtype, narrow_layer: bool
) -> None:
    if narrow_layer and comm.size == 1:
        pytest.skip("one rank does what nn.BatchNorm does, which has narrow statistics there")
    counts = counts_of(comm, "empty")
    batch = [part.to(device, dtype) for part in parts(counts, (40, 40))]
    factors = [part.to(device, dtype) for part in parts(counts, (40, 40), seed=1)]
    reference = layer_for("2d").float().to(device)
    layer = converted(copy.deepcopy(reference), comm, layers)
    if narrow_layer:
        layer.to(dtype)
    everything, mine = torch.cat(batch).float().requires_grad_(), batch[comm.rank].clone().requires_grad_()
    with torch.autocast(device.type, dtype):
        got = layer(mine)
    wanted = reference(everything)
    (got * factors[comm.rank]).sum().backward()
    (wanted * torch.cat(factors).float()).sum().backward()
    assert got.dtype is dtype
    assert gradient(mine).dtype is dtype
    # Half a unit in the last place of the result: nothing but the result was rounded, if the layer is in float32.
    unit = torch.finfo(dtype).eps
    close = partial(torch.testing.assert_close, rtol=0.6 * unit, atol=1e-5)
    close(got.float(), wanted.split(counts)[comm.rank])
    close(gradient(mine).float(), gradient(everything).split(counts)[comm.rank])
    if not narrow_layer:
        torch.testing.assert_close(layer.get_buffer("running_var"), reference.get_buffer("running_var"))
        for parameter, other in zip(layer.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(summed(comm, gradient(parameter)), gradient(other), rtol=1e-4, atol=1e-2)


class Recorder:
    """A communicator that keeps the sizes of what is all-reduced."""

    def __init__(self, comm: Communicator) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.sizes_bytes: list[int] = []
        self._comm = comm

    def all_reduce(self, buffer: Tensor, op: ReduceOp = ReduceOp.SUM, *, blocking: bool = False) -> Work:
        self.sizes_bytes.append(buffer.nbytes)
        return self._comm.all_reduce(buffer, op, blocking=blocking)


def test_what_is_exchanged(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank exchanges nothing")
    recorder = Recorder(comm)
    layer = SyncBatchNorm(CHANNELS, recorder)  # type: ignore[arg-type]
    batch = torch.randn(4, CHANNELS)
    forward_bytes, backward_bytes = 8 * comm.size * (2 * CHANNELS + 2), 8 * CHANNELS
    layer(batch.requires_grad_()).sum().backward()
    assert recorder.sizes_bytes == [forward_bytes, backward_bytes]
    # The input of no rank needs a gradient; those of weight and bias are of this rank's samples.
    layer(batch.detach()).sum().backward()
    assert recorder.sizes_bytes == [forward_bytes, backward_bytes, forward_bytes]
    with torch.no_grad():
        layer(batch)
    layer.eval()(batch)
    assert recorder.sizes_bytes[3:] == [forward_bytes]


@pytest.mark.parametrize("frozen", [False, True])
def test_an_input_that_needs_no_gradient_on_some_ranks(
    comm: Communicator, layers: list[nn.Module], frozen: bool
) -> None:
    reference = layer_for("2d").requires_grad_(not frozen)
    layer = converted(copy.deepcopy(reference), comm, layers)
    batch = parts([4] * comm.size, (4, 3))
    everything, mine = torch.cat(batch).requires_grad_(), batch[comm.rank]
    mine.requires_grad_(comm.rank == comm.size - 1)
    layer(mine).square().sum().backward()
    reference(everything).square().sum().backward()
    if mine.requires_grad:
        torch.testing.assert_close(gradient(mine), gradient(everything).split(4)[comm.rank])
    assert comm.size == 1 or (mine.grad is None) == (comm.rank < comm.size - 1)


def test_gradients_switched_off_on_one_rank_are_told_on_all(comm: Communicator, layers: list[nn.Module]) -> None:
    if comm.size == 1:
        pytest.skip("several ranks")
    layer = converted(layer_for("2d"), comm, layers)
    batch = parts([4] * comm.size, (4, 3))[comm.rank].requires_grad_()
    with torch.set_grad_enabled(comm.rank != 1), pytest.raises(MismatchError, match="on rank 1,"):
        layer(batch)
    layer(batch).sum().backward()


def test_eval_mode_is_local(comm: Communicator, layers: list[nn.Module]) -> None:
    reference = layer_for("2d")
    layer = converted(copy.deepcopy(reference), comm, layers)
    layer.eval()
    reference.eval()
    if comm.rank == 0:
        batch = parts([4], (4, 3))[0]
        assert torch.equal(layer(batch), reference(batch))


def test_eval_mode_without_running_statistics_is_local(comm: Communicator, layers: list[nn.Module]) -> None:
    reference = layer_for("2d", track_running_stats=False)
    layer = converted(copy.deepcopy(reference), comm, layers)
    layer.eval()
    reference.eval()
    if comm.rank == 0:
        batch = parts([4], (4, 3))[0]
        assert torch.equal(layer(batch), reference(batch))


def test_one_value_per_channel_is_refused_on_all_ranks(comm: Communicator, layers: list[nn.Module]) -> None:
    layer = converted(layer_for("features"), comm, layers)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1 if comm.rank == 0 else 0, CHANNELS, dtype=torch.float64))


def test_one_value_per_channel_on_each_of_several_ranks(comm: Communicator, layers: list[nn.Module]) -> None:
    if comm.size == 1:
        pytest.skip("several ranks")
    reference = layer_for("features")
    layer = converted(copy.deepcopy(reference), comm, layers)
    assert_like_one_batch(comm, layer, reference, [1] * comm.size, ())


def test_no_samples_at_all_are_as_in_batch_norm(comm: Communicator, layers: list[nn.Module]) -> None:
    reference = layer_for("2d")
    layer = converted(copy.deepcopy(reference), comm, layers)
    empty = torch.empty(0, CHANNELS, 4, 3, dtype=torch.float64)
    assert layer(empty).shape == reference(empty).shape
    for mine, other in zip(layer.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(4,), (4, CHANNELS + 1, 2)])
def test_input_of_a_wrong_shape(comm: Communicator, layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    layer = converted(layer_for("1d"), comm, layers)
    with pytest.raises(ValueError, match=r"\(N, 3, \.\.\.\)"):
        layer(torch.zeros(shape))


def test_double_backward_is_refused(comm: Communicator, layers: list[nn.Module]) -> None:
    if comm.size == 1:
        pytest.skip("one rank is plain batch normalisation")
    layer = converted(layer_for("2d"), comm, layers)
    batch = parts([4] * comm.size, (4, 3))[comm.rank].requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(layer(batch).square().sum(), batch, create_graph=True)


def network() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 2),
        nn.BatchNorm2d(5, momentum=None),
        nn.Flatten(),
        nn.Linear(5 * 9, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    ).double()


def images(counts: list[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64) + rank,
            torch.randint(3, (count,), generator=generator),
        )
        for rank, count in enumerate(counts)
    ]


@pytest.mark.parametrize("bucket_mb", [1e-4, 25.0])
@pytest.mark.parametrize("shares", SHARES)
def test_training_with_ddp_is_training_on_the_big_batch(
    comm: Communicator, layers: list[nn.Module], shares: str, bucket_mb: float
) -> None:
    counts = counts_of(comm, shares)
    serial = network()
    ddp = DistributedDataParallel(
        converted(network(), comm, layers), comm, bucket_mb=bucket_mb, first_bucket_mb=bucket_mb
    )
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (serial, ddp)]
    for step in range(4):
        batch = images(counts, seed=step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(
            serial(torch.cat([part[0] for part in batch])), torch.cat([part[1] for part in batch])
        ).backward()
        # The average of these over ranks is the mean over all samples; for equal shares they are the usual means.
        inputs, labels = batch[comm.rank]
        loss = nn.functional.cross_entropy(ddp(inputs), labels, reduction="sum") * comm.size / sum(counts)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for mine, wanted in zip(ddp.module.state_dict().values(), serial.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)


def test_activation_checkpointing(comm: Communicator, layers: list[nn.Module]) -> None:
    plain, rerun = (converted(network(), comm, layers) for _ in range(2))
    inputs, labels = images([4] * comm.size, seed=0)[comm.rank]
    nn.functional.cross_entropy(plain(inputs), labels).backward()
    nn.functional.cross_entropy(checkpoint(rerun, inputs, use_reentrant=False), labels).backward()
    for mine, wanted in zip(rerun.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(gradient(mine), gradient(wanted))


def test_a_compiled_model(comm: Communicator, layers: list[nn.Module]) -> None:
    plain, traced = (converted(network(), comm, layers) for _ in range(2))
    compiled = torch.compile(traced, backend="eager")
    inputs, labels = images([4] * comm.size, seed=0)[comm.rank]
    for _ in range(2):
        for model in (plain, compiled):
            nn.functional.cross_entropy(model(inputs), labels).backward()
    for mine, wanted in zip(traced.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(gradient(mine), gradient(wanted))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(traced.get_buffer(name), buffer)


class TestConversion:
    def test_layers_stay_the_same_objects_with_all_they_hold(self, comm: Communicator, layers: list[nn.Module]) -> None:
        model: Any = network()
        model[4].eval()
        seen: list[tuple[int, ...]] = []
        model[1].register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
        before, keys = list(model.modules()), list(model.state_dict())
        tensors = [*model.parameters(), *model.buffers()]
        assert converted(model, comm, layers) is before[0]
        assert all(mine is other for mine, other in zip(model.modules(), before, strict=True))
        assert all(mine is other for mine, other in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
        assert list(model.state_dict()) == keys
        assert [type(model[index]) for index in (1, 4, 7)] == [SyncBatchNorm] * 3
        assert len({id(model[index].comm) for index in (1, 4, 7)}) == 1
        assert model[1].comm is not comm
        assert (model[1].training, model[4].training) == (True, False)
        model(images([4] * comm.size, seed=0)[comm.rank][0])
        assert seen == [(4, 4, 4, 4)]
        # A checkpoint of the plain model loads, and the other way round.
        model.load_state_dict(network().state_dict())
        network().load_state_dict(model.state_dict())

    def test_a_layer_alone_and_torchs_own(self, comm: Communicator, layers: list[nn.Module]) -> None:
        reference = nn.BatchNorm1d(CHANNELS, momentum=None).double()
        theirs = nn.SyncBatchNorm(CHANNELS, momentum=None).double()
        layer = converted(theirs, comm, layers)
        assert type(layer) is SyncBatchNorm
        assert_like_one_batch(comm, layer, reference, counts_of(comm, "uneven"), (5,))

    def test_a_subclass_that_computes_the_same(self, comm: Communicator, layers: list[nn.Module]) -> None:
        class Small(nn.BatchNorm2d):
            def __init__(self) -> None:
                super().__init__(CHANNELS, eps=0.1, dtype=torch.float64)

        reference = Small()
        layer = converted(copy.deepcopy(reference), comm, layers)
        assert_like_one_batch(comm, layer, reference, counts_of(comm, "equal"), (4, 3))

    def test_a_model_without_batch_normalisation(self, comm: Communicator) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3))
        kinds = [type(layer) for layer in model]
        assert convert_sync_batchnorm(model, comm) is model
        assert [type(layer) for layer in model] == kinds

    def test_what_cannot_be_converted_is_refused_and_nothing_changed(self, comm: Communicator) -> None:
        class Own(nn.BatchNorm1d):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input).relu()

        parametrized = nn.BatchNorm1d(3)
        nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
        refused = [(nn.LazyBatchNorm1d(), "not seen an input"), (Own(3), "forward"), (parametrized, "parametrized")]
        for bad, why in refused:
            model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(bad))
            with pytest.raises(ValueError, match=rf"'1\.0'.*{why}"):
                convert_sync_batchnorm(model, comm)
            assert type(model.get_submodule("0")) is nn.BatchNorm1d

    def test_deep_copies_share_the_communicator(self, comm: Communicator, layers: list[nn.Module]) -> None:
        reference = layer_for("2d")
        layer = converted(copy.deepcopy(reference), comm, layers)
        twin = copy.deepcopy(layer)
        assert isinstance(twin, SyncBatchNorm)
        assert isinstance(layer, SyncBatchNorm)
        assert twin.comm is layer.comm
        assert_like_one_batch(comm, twin, reference, counts_of(comm, "uneven"), (4, 3))

    def test_pickling_leaves_the_communicator_behind(self, comm: Communicator, layers: list[nn.Module]) -> None:
        reference = layer_for("2d")
        model = converted(nn.Sequential(copy.deepcopy(reference)), comm, layers)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        batch = parts([4] * comm.size, (4, 3))[comm.rank]
        with pytest.raises(RuntimeError, match="convert_sync_batchnorm"):
            loaded(batch)
        loaded.eval()(batch)
        converted(loaded.train(), comm, layers)
        assert loaded[0].comm is not model.get_submodule("0").comm
        assert_like_one_batch(comm, loaded, nn.Sequential(reference), counts_of(comm, "uneven"), (4, 3))

    def test_closing(self, comm: Communicator) -> None:
        model = convert_sync_batchnorm(nn.Sequential(layer_for("2d"), layer_for("2d")), comm)
        twin = copy.deepcopy(model)
        batch = parts([4] * comm.size, (4, 3))[comm.rank]
        for _ in range(2):
            close_sync_batchnorm(model)
        for closed in (model, twin):
            with pytest.raises(RuntimeError, match="closing"):
                closed(batch)
            closed.eval()(batch)
        comm.barrier().wait()
