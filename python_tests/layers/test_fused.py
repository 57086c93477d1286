"""Activation and residual in the layer's own passes: what the layers, the functions and autograd make of them.

That values and gradients are the oracle's, on every path, is a matter of the case table (`cases.py`).
"""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cbn_ext
from cbn_ext import (
    CompoundBatchNorm1d,
    CompoundBatchNorm2d,
    CompoundBatchNorm3d,
    CompoundBatchNormAct1d,
    CompoundBatchNormAct2d,
    CompoundBatchNormAct3d,
    compound_batch_norm,
    split_batch_norm,
    split_path,
)
from python_tests.support import cases
from python_tests.support.cases import EPS, MOMENTUM, Case, with_layout
from python_tests.support.tolerances import assert_close

LAYERS = [CompoundBatchNormAct1d, CompoundBatchNormAct2d, CompoundBatchNormAct3d]
PLAIN = [CompoundBatchNorm1d, CompoundBatchNorm2d, CompoundBatchNorm3d]
dims = pytest.mark.parametrize("dims", [0, 1, 2, 3])
responsibilities = pytest.mark.parametrize("responsibility", ["channel", "joint"])
activations = pytest.mark.parametrize("activation", ["relu", None])
residuals = pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
paths = pytest.mark.parametrize("path", ["compound", "split", "evaluation"])


def identity_layer(channels, path="compound", **options):
    """A layer whose normalization gives 0, exactly: its output is act(residual)."""
    layer = CompoundBatchNormAct2d(channels, **options).train(path != "evaluation")
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer


# --- the layers


def test_public_names():
    assert set(cbn_ext.__all__) >= {layer.__name__ for layer in LAYERS}


@pytest.mark.parametrize(("layer", "plain"), list(zip(LAYERS, PLAIN, strict=True)))
def test_layers_are_the_plain_ones_with_an_activation(layer, plain):
    assert issubclass(layer, plain)
    assert inspect.signature(layer).parameters["activation"].default == "relu"
    assert str(inspect.signature(layer.forward).replace(parameters=[
        p.replace(annotation=p.empty) for p in inspect.signature(layer.forward).parameters.values()
    ], return_annotation=inspect.Signature.empty)) == "(self, input, residual=None)"  # fmt: skip
    text = repr(layer(7, 3, momentum=None, responsibility="joint", activation=None))
    assert text.startswith(f"{layer.__name__}(7, num_components=3") and text.endswith("activation=None)")
    assert "responsibility='joint'" in text and "momentum=None" in text


@dims
@responsibilities
@activations
@residuals
def test_layer_is_the_composition(backend, dims, responsibility, activation, residual):
    """act(cbn(x) + residual), its gradients and the running statistics, over two steps and in evaluation."""
    shape = (6, 5, *[4] * dims)
    torch.manual_seed(0)
    options = {"responsibility": responsibility, "dtype": torch.float64}
    fused = LAYERS[max(dims - 1, 0)](5, activation=activation, **options)
    plain = PLAIN[max(dims - 1, 0)](5, **options)
    plain.load_state_dict(fused.state_dict())
    for training in (True, True, False):
        tensors = [1 + 2 * torch.randn(shape, dtype=torch.float64) for _ in range(2)]
        ours, theirs = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
        y = fused.train(training)(ours[0], *ours[1:] if residual else ())
        before = plain.train(training)(theirs[0])
        before = before + theirs[1] if residual else before
        expected = before.relu() if activation == "relu" else before
        assert before.abs().min() > 1e-9  # no element is at the kink
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        for mine, others in zip(ours[: 1 + residual], theirs, strict=False):
            torch.testing.assert_close(mine.grad, others.grad)
    for mine, others in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, others.grad)
    for mine, others in zip(fused.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, others)


def test_checkpoints_fit_all_three():
    """State of a batch normalization, the plain layer and the one with activation, which has none of its own."""
    norm = nn.BatchNorm2d(5)
    for _ in range(3):
        norm(3 + 2 * torch.randn(8, 5, 4, 4))
    x = torch.randn(8, 5, 4, 4)
    fused = CompoundBatchNormAct2d(5)
    fused.load_state_dict(norm.state_dict())
    torch.testing.assert_close(fused.eval()(x), F.relu(norm.eval()(x)))
    plain = CompoundBatchNorm2d(5)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain.eval()(x), norm(x))
    back = CompoundBatchNormAct2d(5, activation=None)
    back.load_state_dict(plain.state_dict())
    assert torch.equal(back.eval()(x), plain(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_the_activation(duplicate):
    layer = CompoundBatchNormAct2d(5, activation=None)
    x = torch.randn(4, 5, 6, 6)
    assert torch.equal(duplicate(layer)(x), layer(x))


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_other_options_hold(backend, options):
    fused, plain = CompoundBatchNormAct2d(5, **options), CompoundBatchNorm2d(5, **options)
    plain.load_state_dict(fused.state_dict())
    for _ in range(2):
        x, residual = torch.randn(2, 4, 5, 6, 6)
        torch.testing.assert_close(fused(x, residual), F.relu(plain(x) + residual))
    for mine, others in zip(fused.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, others)


def test_split_path_of_a_layer(backend):
    fused, plain = CompoundBatchNormAct2d(5), CompoundBatchNorm2d(5)
    plain.load_state_dict(fused.state_dict())
    x, residual = torch.randn(2, 8, 5, 6, 6)
    with split_path(torch.arange(8) % 4):
        torch.testing.assert_close(fused(x, residual), F.relu(plain(x) + residual))
    assert torch.equal(fused.running_mean, plain.running_mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_once(backend, dtype):
    """The sum is made before it is rounded: 1 + 2^-12 less 1, of which a normalised x in 16 bits would keep nothing."""
    layer = identity_layer(3, num_components=1)
    with torch.no_grad():
        layer.bias.fill_(1 + 2**-12)
    residual = torch.full((4, 3, 5, 5), -1.0, dtype=dtype)
    y = layer(torch.randn(4, 3, 5, 5).to(dtype), residual)
    assert y.dtype == dtype and torch.equal(y, torch.full_like(y, 2**-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_inputs_dtype(backend, dtype):
    layer = CompoundBatchNormAct2d(5)
    x, residual = torch.randn(2, 4, 5, 6, 6).to(dtype)
    expected = copy.deepcopy(layer)(x, residual)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, residual)
    assert y.dtype == dtype and torch.equal(y, expected)


@responsibilities
def test_meta_device(responsibility):
    layer = CompoundBatchNormAct2d(5, responsibility=responsibility, device="meta")
    x, residual = (torch.randn(4, 5, 6, 6, device="meta", requires_grad=True) for _ in range(2))
    y = layer(x, residual)
    y.sum().backward()
    assert y.is_meta and y.shape == x.grad.shape == residual.grad.shape == x.shape


@paths
def test_empty_input(backend, path):
    layer = CompoundBatchNormAct2d(3).train(path != "evaluation")
    before = layer.running_mean.clone()
    x, residual = (torch.randn(0, 3, 4, 4, requires_grad=True) for _ in range(2))
    with split_path(torch.zeros(0, dtype=torch.long)) if path == "split" else torch.enable_grad():
        y = layer(x, residual)
    y.sum().backward()
    assert y.shape == x.grad.shape == residual.grad.shape == x.shape
    assert not layer.weight.grad.any() and torch.equal(layer.running_mean, before)


# --- the ReLU's gate


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(64, 7, 37, 41), (3, 33, 5, 5), (1, 1, 1, 2), (95, 44, 8, 8), (9, 3, 1, 1), (16, 16, 32, 32)]
)
@paths
def test_every_bit_of_the_mask(backend, threads, shape, layout, path):
    """Neighbouring bits are written by several threads; each is right, whatever the shape."""
    threads(3)
    layer = identity_layer(shape[1], path)
    x, residual, grad = (with_layout(torch.randn(shape), layout) for _ in range(3))
    residual[torch.rand(shape) < 0.1] = 0
    residual.requires_grad_()
    with split_path(torch.arange(shape[0]) % 4) if path == "split" else torch.enable_grad():
        y = layer(x, residual)
    assert torch.equal(y, residual.relu())
    y.backward(grad)
    assert torch.equal(residual.grad, torch.where(residual > 0, grad, 0.0))


@paths
@residuals
def test_gradient_at_the_kink_is_zero(backend, path, residual):
    """As torch has it: an output of exactly 0 passes nothing on, 0 times infinity included."""
    layer = identity_layer(3, path)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    zeros = torch.zeros_like(x, requires_grad=True) if residual else None
    with split_path(torch.arange(4)) if path == "split" else torch.enable_grad():
        y = layer(x, zeros)
    y.backward(torch.full_like(y, torch.inf))
    grads = [x.grad, layer.weight.grad, layer.bias.grad] + ([zeros.grad] if residual else [])
    assert not y.any() and not any(grad.any() for grad in grads)


@responsibilities
@residuals
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_nan_passes_the_relu(backend, responsibility, residual, dtype):
    """A NaN of the input or the residual is seen in the output, and its gradient in the gradients, as with F.relu."""
    state = torch.float64 if dtype == torch.float64 else None
    layer = CompoundBatchNormAct2d(3, responsibility=responsibility, dtype=state).eval()
    plain = CompoundBatchNorm2d(3, responsibility=responsibility, dtype=state).eval()
    plain.load_state_dict(layer.state_dict())
    tensors = torch.randn(3, 2, 3, 5, 5).to(dtype)
    tensors[0, 0, 1, 2, 3] = torch.nan
    tensors[1, 1, 2, 3, 4] = torch.nan
    ours, theirs = ([t.clone().requires_grad_() for t in tensors[:2]] for _ in range(2))
    y = layer(ours[0], ours[1] if residual else None)
    expected = F.relu(plain(theirs[0]) + (theirs[1] if residual else 0))
    y.backward(tensors[2])
    expected.backward(tensors[2])
    assert y.isnan().any() and torch.equal(y.isnan(), expected.isnan())
    for mine, others in zip(ours, theirs, strict=True):
        if mine.grad is not None:
            assert torch.equal(mine.grad.isnan(), others.grad.isnan())
    if residual:
        assert ours[1].grad[1, 2, 3, 4] == tensors[2][1, 2, 3, 4]


def test_nan_spreads_in_training_as_it_does_without(backend):
    layer = CompoundBatchNormAct2d(2)
    x = torch.randn(4, 2, 5, 5)
    x[0, 1, 2, 3] = torch.nan
    y = layer(x, torch.randn_like(x))
    assert y[:, 1].isnan().all() and y[:, 0].isfinite().all()


# --- what is kept for backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("responsibility", ["channel", "joint"])
@activations
@residuals
@paths
def test_saved_for_backward(backend, dtype, layout, responsibility, activation, residual, path):
    """x, for a ReLU of a sum one bit an element, in joint mode M numbers a point; no residual, no output."""
    x, added = (with_layout(torch.randn(16, 12, 15, 15).to(dtype), layout).requires_grad_() for _ in range(2))
    layer = CompoundBatchNormAct2d(12, responsibility=responsibility, activation=activation)
    layer.train(path != "evaluation")
    groups = torch.arange(16) % 4
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with split_path(groups) if path == "split" else torch.enable_grad():
            y = layer(x, added if residual else None)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        assert storages.pop(x.untyped_storage().data_ptr()) == x.numel() * x.element_size()
        assert added.untyped_storage().data_ptr() not in storages
        assert y.untyped_storage().data_ptr() not in storages
        # Weight, bias, and mass or prior, mean and variance of the batch and of the mixture: a handful of (M, C).
        rest = 8 * layer.weight.numel() * 4 + groups.nbytes
        words = (x.numel() + 31) // 32 * 4 if residual and activation == "relu" else 0
        joint = responsibility == "joint" and path != "split"
        posterior = layer.num_components * x.numel() // x.shape[1] * 4 if joint else 0
        assert sum(storages.values()) <= words + posterior + rest
        y.sum().backward()


@paths
def test_gradient_of_a_residual_without_activation_is_the_output_gradient(backend, path):
    """The very tensor: nothing is computed or copied for it."""
    layer = CompoundBatchNormAct2d(3, activation=None).train(path != "evaluation")
    x, residual, grad = torch.randn(3, 4, 3, 5, 5)
    residual.requires_grad_()
    with split_path(torch.arange(4)) if path == "split" else torch.enable_grad():
        y = layer(x, residual)
    (got,) = torch.autograd.grad(y, residual, grad)
    assert got.data_ptr() == grad.data_ptr()


def test_only_what_is_asked_for(backend):
    """A residual, or an input, that needs no gradient gets none; the others' stay the same."""
    case = Case(activation="relu", residual=True)
    x, grad, residual, _, *running, weight, bias = case.arguments()
    full = cases.run(case, backend)
    for wanted in (x, residual):
        wanted.requires_grad_()
        state = [t.clone() for t in running]
        y = compound_batch_norm(x, *state, weight, bias, True, MOMENTUM, EPS, residual=residual, activation="relu")
        y.backward(grad)
        assert torch.equal(wanted.grad, full.grad_input if wanted is x else full.grad_residual)
        wanted.requires_grad_(False)


def test_two_forwards_before_one_backward(backend):
    layer = CompoundBatchNormAct2d(5, dtype=torch.float64)
    batches, residuals = torch.randn(2, 2, 4, 5, 6, 6, dtype=torch.float64)
    alone = copy.deepcopy(layer)
    for batch, residual in zip(batches, residuals, strict=True):
        alone(batch, residual).square().mean().backward()
    sum(layer(b, r).square().mean() for b, r in zip(batches, residuals, strict=True)).backward()
    assert_close(layer.weight.grad, alone.weight.grad, "grad_affine", torch.float64)
    assert_close(layer.bias.grad, alone.bias.grad, "grad_affine", torch.float64)


# --- arguments that do not fit


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"residual": torch.randn(4, 3, 1, 1)}, RuntimeError, r"residual.*\(4, 3, 5, 5\).*\(4, 3, 1, 1\)"),
        ({"residual": torch.randn(3, 5, 5)}, RuntimeError, r"residual.*\(4, 3, 5, 5\).*\(3, 5, 5\)"),
        ({"residual": torch.randn(4, 3, 5, 5).double()}, RuntimeError, "residual.*float32.*float64"),
        ({"residual": torch.randn(4, 3, 5, 5, device="meta")}, RuntimeError, "residual.*cpu.*meta"),
        ({"activation": "gelu"}, ValueError, "relu.*gelu"),
    ],
)
@pytest.mark.parametrize("mode", ["compound", "split"])
def test_arguments_that_do_not_fit(backend, mode, changed, error, message):
    x, state = torch.randn(4, 3, 5, 5), torch.ones(2, 3)
    function, first = (split_batch_norm, torch.arange(4) % 2) if mode == "split" else (compound_batch_norm, state)
    with pytest.raises(error, match=message):
        function(x, first, state, state, None, None, **changed)


def test_unknown_activation_of_a_layer():
    with pytest.raises(ValueError, match=r"relu.*'tanh'"):
        CompoundBatchNormAct2d(3, activation="tanh")
