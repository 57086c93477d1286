"""One component makes nn.BatchNorm1d, 2d and 3d of the layers: outputs, gradients, running state, errors, edges."""

import copy
import re

import pytest
import torch
from torch import nn

from cbn_ext import CompoundBatchNorm1d, CompoundBatchNorm2d, CompoundBatchNorm3d
from python_tests.support.cases import with_layout
from python_tests.support.tolerances import assert_close

LAYERS = {
    1: (CompoundBatchNorm1d, nn.BatchNorm1d),
    2: (CompoundBatchNorm2d, nn.BatchNorm2d),
    3: (CompoundBatchNorm3d, nn.BatchNorm3d),
}
SHAPES = [(1, (7, 5)), (1, (4, 5, 9)), (2, (4, 5, 6, 3)), (3, (3, 5, 2, 4, 3))]
SHAPE_IDS = ["1d-NC", "1d-NCL", "2d", "3d"]
BUFFERS = ("running_mean", "running_var")


def pair(dims, num_features, **options):
    """The layer with one component and nn.BatchNorm, with the same affine parameters and the same options."""
    ours, norm = (
        layer(num_features, *components, **options) for layer, components in zip(LAYERS[dims], ([1], []), strict=True)
    )
    if norm.affine:
        with torch.no_grad():
            for a, b in ((ours.weight, norm.weight), (ours.bias, norm.bias)):
                a.copy_(b.normal_())
    return ours, norm


def assert_same_step(ours, norm, x, grad):
    """One forward and backward of both; outputs, gradients and running state agree within the tolerance table."""
    reference = copy.deepcopy(norm).double()
    results = []
    for layer, dtype in ((ours, x.dtype), (reference, torch.float64)):
        layer.zero_grad()
        leaf = x.detach().to(dtype).requires_grad_()
        y = layer(leaf)
        y.backward(grad.to(dtype))
        results.append((y, leaf.grad))
    (y, grad_input), (wanted, wanted_grad) = results
    assert_close(y, wanted, "output", x.dtype)
    assert y.dtype == x.dtype
    # A three-dimensional tensor has no memory format to keep.
    assert norm(x).stride() == y.stride() or x.ndim == 3
    assert_close(grad_input, wanted_grad, "grad_input", x.dtype)
    if norm.affine:
        assert_close(ours.weight.grad[0], reference.weight.grad, "grad_affine", x.dtype)
        assert_close(ours.bias.grad[0], reference.bias.grad, "grad_affine", x.dtype)
    assert_same_state(ours, reference, x.dtype)


def assert_same_state(ours, norm, dtype=torch.float32):
    if not norm.track_running_stats:
        assert all(getattr(ours, name) is None for name in (*BUFFERS, "running_prior", "num_batches_tracked"))
        return
    for name in BUFFERS:
        assert_close(getattr(ours, name)[0], getattr(norm, name).double(), "statistics", dtype)
    assert torch.equal(ours.running_prior, torch.ones_like(ours.running_prior))
    assert torch.equal(ours.num_batches_tracked, norm.num_batches_tracked)
    assert ours.num_batches_tracked.dtype == norm.num_batches_tracked.dtype


@pytest.mark.parametrize(("dims", "shape"), SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("track", [True, False], ids=["track", "no_track"])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None], ids=str)
def test_training_then_evaluation(backend, dims, shape, dtype, layout, affine, track, momentum):
    ours, norm = pair(dims, shape[1], momentum=momentum, affine=affine, track_running_stats=track, dtype=dtype)
    for training in (True, True, True, False):
        ours.train(training), norm.train(training)
        size = shape if training else (1, *shape[1:])  # evaluation takes a batch of one in any shape
        if not (training or track) and len(shape) == 2:
            size = shape  # without tracking evaluation uses batch statistics too
        x = with_layout(2 + 3 * torch.randn(size, dtype=dtype), layout)
        assert_same_step(ours, norm, x, with_layout(torch.randn(size, dtype=dtype), layout))


@pytest.mark.parametrize(("dims", "shape"), SHAPES, ids=SHAPE_IDS)
def test_start_state(dims, shape):
    """Mean 0 and variance 1 exactly, and the affine pair of both starts is 1 and 0."""
    for affine_init in (None, "preserve", "unit"):
        ours = LAYERS[dims][0](shape[1], 1, affine_init=affine_init)
        norm = LAYERS[dims][1](shape[1])
        for name in (*BUFFERS, "weight", "bias"):
            assert torch.equal(getattr(ours, name)[0], getattr(norm, name)), name


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_of_one(backend, dims, training):
    ours, norm = pair(dims, 3)
    ours.train(training), norm.train(training)
    shape = (1, 3, *[4] * dims)
    assert_same_step(ours, norm, torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("track", [True, False], ids=["track", "no_track"])
def test_one_value_per_channel(backend, shape, track):
    """Training (and evaluation without tracking) refuses it in nn.BatchNorm's words; evaluation takes it."""
    ours, norm = pair(max(1, len(shape) - 2), 3, track_running_stats=track)
    x = torch.randn(shape)
    for training in (True, False):
        ours.train(training), norm.train(training)
        if not training and track:
            assert_same_step(ours, norm, x, torch.randn(shape))
            continue
        with pytest.raises(ValueError, match="xpected") as theirs:
            norm(x)
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            ours(x)
    assert_same_state(ours, norm)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_empty_batch(backend, shape, training, momentum):
    """An empty output, zero gradients, running statistics bit for bit as they were."""
    ours, norm = pair(max(1, len(shape) - 2), 3, momentum=momentum)
    before = {name: getattr(ours, name).clone() for name in (*BUFFERS, "running_prior")}
    for layer in (ours.train(training), norm.train(training)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == shape and x.grad.shape == shape
        assert not layer.weight.grad.any() and not layer.bias.grad.any()
    for name, value in before.items():
        assert torch.equal(getattr(ours, name), value), name
    assert_same_state(ours, norm)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_wrong_number_of_dimensions(backend, dims):
    ours, norm = pair(dims, 3)
    for wrong in {(3,), (2, 3), (2, 3, 4), (2, 3, 4, 4), (2, 3, 4, 4, 4), (2, 3, 4, 4, 4, 4)}:
        if len(wrong) in ((2, 3) if dims == 1 else (dims + 2,)):
            continue
        with pytest.raises(ValueError, match="xpected") as theirs:
            norm(torch.randn(wrong))
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            ours(torch.randn(wrong))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("track", [True, False], ids=["track", "no_track"])
def test_wrong_number_of_channels(backend, training, track):
    """A RuntimeError that, as nn.BatchNorm's, names both counts."""
    ours, norm = pair(2, 7, track_running_stats=track)
    for layer in (ours, norm):
        with pytest.raises(RuntimeError, match=r"(?s)(7.*11|11.*7)"):
            layer.train(training)(torch.randn(2, 11, 4, 4))


@pytest.mark.parametrize(
    ("layer_dtype", "input_dtype"),
    [
        (torch.float32, torch.int64),
        (torch.float32, torch.complex64),
        (torch.float32, torch.bool),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_dtypes(backend, layer_dtype, input_dtype, training):
    """The same type of error: NotImplementedError for what no layer takes, RuntimeError for a mixture."""
    ours, norm = pair(2, 3, dtype=layer_dtype)
    x = torch.ones(2, 3, 4, 4).to(input_dtype)
    with pytest.raises(RuntimeError) as theirs:  # NotImplementedError is one
        norm.train(training)(x)
    with pytest.raises(RuntimeError, match=re.escape(str(input_dtype))) as raised:
        ours.train(training)(x)
    assert raised.type is theirs.type


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_wrong_device(backend, training):
    ours, norm = pair(2, 3)
    for layer in (ours, norm):
        with pytest.raises(RuntimeError, match=r"meta"):
            layer.train(training)(torch.randn(2, 3, 4, 4, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own_dtype", [True, False], ids=["16-bit_layer", "float32_layer"])
def test_16_bit_input(backend, dtype, own_dtype):
    """Output in the input's dtype, state in the layer's, rounded once."""
    ours, norm = pair(2, 5, dtype=dtype if own_dtype else torch.float32)
    for training in (True, True, False):
        ours.train(training), norm.train(training)
        x = (2 + 3 * torch.randn(4, 5, 6, 3)).to(dtype)
        assert_same_step(ours, norm, x, torch.randn(x.shape).to(dtype))
        norm.load_state_dict({name: getattr(ours, name)[0] if name != "num_batches_tracked" else getattr(ours, name)
                              for name in norm.state_dict()})  # fmt: skip
    assert ours.running_mean.dtype == ours.weight.dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_and_inf_propagate(backend, bad, training):
    """Where nn.BatchNorm's output, gradients and running state are not finite, ours are not, and nowhere else.

    But for the bias: its gradient does not depend on x there, here it is weighted by the responsibilities.
    """
    ours, norm = pair(2, 3)
    x = torch.randn(4, 3, 5, 5)
    x[1, 1, 2, 3] = bad
    results = []
    for layer in (ours.train(training), norm.train(training)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(torch.ones_like(y))
        # In evaluation the bad point's own derivative does not matter to anything else; it may be nan or not.
        grad = leaf.grad if training else leaf.grad.where(x.isfinite(), 0)
        state = (layer.running_mean, layer.running_var, layer.weight.grad)
        results.append([t.isfinite() for t in (y, grad, *(t.flatten() for t in state))])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
