"""The layers: arguments, start values, running state, (de)serialisation, and what is kept for backward."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from torch import nn

import cbn_ext
from cbn_ext import CompoundBatchNorm1d, CompoundBatchNorm2d, CompoundBatchNorm3d
from python_tests.support.cases import MOMENTUM, Case
from python_tests.support.tolerances import assert_close

LAYERS = [CompoundBatchNorm1d, CompoundBatchNorm2d, CompoundBatchNorm3d]
NORMS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
RUNNING = ("running_prior", "running_mean", "running_var")
modes = pytest.mark.parametrize("responsibility", ["channel", "joint"])


def trained(**options):
    """A layer after two steps."""
    layer = CompoundBatchNorm2d(5, **options)
    for _ in range(2):
        layer(1 + 2 * torch.randn(4, 5, 6, 6, dtype=layer.weight.dtype))
    return layer


# --- the interface


@pytest.mark.parametrize("layer", LAYERS)
def test_signature(layer):
    defaults = {name: p.default for name, p in inspect.signature(layer).parameters.items()}
    assert defaults.pop("num_features") is inspect.Parameter.empty
    assert defaults == {
        "num_components": 4,
        "eps": 1e-5,
        "momentum": 0.1,
        "affine": True,
        "track_running_stats": True,
        "responsibility": "channel",
        "detach_responsibility": False,
        "affine_init": None,
        "device": None,
        "dtype": None,
    }


@modes
@pytest.mark.parametrize("components", [1, 4, 16])
def test_shapes_and_dtypes(responsibility, components):
    layer = CompoundBatchNorm2d(3, components, responsibility=responsibility)
    shape = (components, 3)
    assert {name: p.shape for name, p in layer.named_parameters()} == {"weight": shape, "bias": shape}
    assert list(layer.state_dict()) == ["weight", "bias", *RUNNING, "num_batches_tracked"]
    assert layer.running_prior.shape == (shape if responsibility == "channel" else (components,))
    assert layer.running_mean.shape == layer.running_var.shape == shape
    assert layer.num_batches_tracked.dtype == torch.long and layer.num_batches_tracked == 0
    double = CompoundBatchNorm2d(3, components, responsibility=responsibility, dtype=torch.float64)
    assert {t.dtype for t in (*double.parameters(), *(getattr(double, n) for n in RUNNING))} == {torch.float64}


def test_without_affine_and_without_tracking():
    layer = CompoundBatchNorm2d(3, affine=False, track_running_stats=False)
    assert not layer.state_dict() and layer.weight is None and layer.bias is None
    assert all(getattr(layer, name) is None for name in (*RUNNING, "num_batches_tracked"))
    layer.reset_parameters()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"responsibility": "pixel"}, "channel.*joint.*pixel"),
        ({"affine_init": "ones"}, "preserve.*unit.*ones"),
        ({"num_components": 0}, "1.*16.*0"),
        ({"num_components": 17}, "1.*16.*17"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CompoundBatchNorm2d(3, **options)


def test_repr_names_every_argument():
    text = repr(CompoundBatchNorm2d(7, 3, eps=1e-3, momentum=None, affine=False, responsibility="joint"))
    assert text.startswith("CompoundBatchNorm2d(7, num_components=3, eps=0.001, momentum=None, affine=False")
    assert "responsibility='joint'" in text


# --- start values


@modes
@pytest.mark.parametrize("affine_init", [None, "preserve", "unit"])
@pytest.mark.parametrize("components", [1, 2, 3, 4, 7, 16])
def test_start_mixture_has_mean_0_and_variance_1(responsibility, affine_init, components):
    layer = CompoundBatchNorm2d(
        6, components, responsibility=responsibility, affine_init=affine_init, dtype=torch.float64
    )
    prior = layer.running_prior.reshape(components, -1).expand(components, 6)
    assert torch.equal(prior, torch.full_like(prior, 1 / components))
    mean, var = layer.running_mean, layer.running_var
    assert (var > 0).all()
    torch.testing.assert_close((prior * mean).sum(0), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close((prior * (var + mean**2)).sum(0), torch.ones(6, dtype=torch.float64))
    # Identical components never separate: every two differ, in every channel.
    distance = (mean[:, None] - mean).abs() + torch.eye(components)[..., None]
    assert distance.min() > 0.01
    if affine_init == "unit" or (affine_init is None and responsibility == "joint"):
        assert torch.equal(layer.weight, torch.ones_like(mean)) and not layer.bias.any()
    else:
        torch.testing.assert_close(layer.weight.detach(), var.sqrt())
        torch.testing.assert_close(layer.bias.detach(), mean)


def test_start_order_is_each_channels_own_and_repeatable():
    """Drawn from torch's generator; every component is lowest in about a quarter of the channels."""
    torch.manual_seed(7)
    first, second = CompoundBatchNorm2d(256), CompoundBatchNorm2d(256)
    torch.manual_seed(7)
    again = CompoundBatchNorm2d(256)
    assert torch.equal(first.running_mean, again.running_mean)
    assert not torch.equal(first.running_mean, second.running_mean)
    sorted_means = first.running_mean.sort(0).values
    assert (sorted_means == sorted_means[:, :1]).all()
    orders = {tuple(order) for order in first.running_mean.argsort(0).T.tolist()}
    assert len(orders) == math.factorial(4)
    lowest = first.running_mean.argmin(0).bincount(minlength=4)
    assert (lowest - 64).abs().max() < 4 * math.sqrt(256 * 0.25 * 0.75)


@modes
def test_preserving_start_leaves_standardised_inputs_alone(backend, responsibility):
    """With the running statistics every branch agrees: y = x but for epsilon, whatever the responsibilities."""
    layer = CompoundBatchNorm2d(6, 4, responsibility=responsibility, affine_init="preserve", dtype=torch.float64)
    x = 3 * torch.randn(4, 6, 5, 5, dtype=torch.float64)
    y = layer.eval()(x)
    # A branch is x - mean times sqrt(var/(var + eps)) plus mean.
    allowed = (x.abs().max() + layer.running_mean.abs().max()) * layer.eps / layer.running_var.min()
    assert (y - x).abs().max() < allowed


def test_unit_start_folds_the_components():
    """And that is not the identity: the two starts are two different layers."""
    x = torch.randn(4, 6, 5, 5)
    assert (CompoundBatchNorm2d(6, affine_init="unit").eval()(x) - x).abs().max() > 0.1


@modes
def test_reset(responsibility):
    layer = trained(responsibility=responsibility)
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0
    fresh = CompoundBatchNorm2d(5, responsibility=responsibility)
    for name in RUNNING:
        torch.testing.assert_close(getattr(layer, name).sort(0).values, getattr(fresh, name).sort(0).values)
    nn.init.normal_(layer.weight)
    layer.reset_parameters()
    torch.testing.assert_close(layer.weight, fresh.weight)


# --- training and evaluation


@modes
def test_evaluation_changes_nothing(backend, responsibility):
    layer = trained(responsibility=responsibility).eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 5, 6, 6)
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@modes
def test_cumulative_average(backend, responsibility):
    """momentum=None weighs all batches alike: the running mean is the mean of the batches' means."""
    layer = CompoundBatchNorm2d(3, 1, momentum=None, responsibility=responsibility, dtype=torch.float64)
    batches = torch.randn(5, 4, 3, 6, 6, dtype=torch.float64)
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean[0], batches.mean((0, 1, 3, 4)), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        layer.running_var[0], batches.movedim(2, 1).flatten(2).var(2).mean(0), rtol=1e-12, atol=1e-13
    )


def test_without_tracking_batch_statistics_always(backend):
    layer = CompoundBatchNorm2d(5, track_running_stats=False)
    x = 1 + 2 * torch.randn(4, 5, 6, 6)
    training = layer(x)
    assert torch.equal(layer(x), training)  # no memory of the call before
    assert torch.equal(layer.eval()(x), training)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_input_keeps_a_wide_state(backend, dtype):
    layer = CompoundBatchNorm2d(5)
    y = layer((1 + 2 * torch.randn(4, 5, 6, 6)).to(dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert {t.dtype for t in (layer.weight.grad, layer.bias.grad, *(getattr(layer, n) for n in RUNNING))} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_inputs_dtype(backend, dtype):
    """As nn.BatchNorm does: computed in float32, returned as it came."""
    layer, x = CompoundBatchNorm2d(5), torch.randn(4, 5, 6, 6).to(dtype)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype and torch.equal(y, expected)
    assert layer.running_mean.dtype == torch.float32


# --- copies, checkpoints, moves


@modes
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_independent_and_equal(responsibility, duplicate):
    layer = trained(responsibility=responsibility, momentum=0.3)
    twin = duplicate(layer)
    x = torch.randn(4, 5, 6, 6)
    assert torch.equal(layer(x), twin(x))
    twin(x)
    assert not torch.equal(layer.running_mean, twin.running_mean)
    assert repr(layer) == repr(twin)


@modes
def test_state_dict_round_trip(responsibility):
    layer = trained(responsibility=responsibility)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = CompoundBatchNorm2d(5, responsibility=responsibility)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.num_batches_tracked == 2
    x = torch.randn(4, 5, 6, 6)
    assert torch.equal(layer(x), other(x)) and torch.equal(layer.eval()(x), other.eval()(x))


def test_state_of_other_components_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        CompoundBatchNorm2d(5, 3).load_state_dict(CompoundBatchNorm2d(5, 4).state_dict())
    state = CompoundBatchNorm2d(5, 4).state_dict()
    del state["running_prior"]
    with pytest.raises(RuntimeError, match=r"Missing key.*running_prior"):
        CompoundBatchNorm2d(5, 4).load_state_dict(state)


@pytest.mark.parametrize(("layer", "norm"), list(zip(LAYERS, NORMS, strict=True)))
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("track", [True, False], ids=["track", "no_track"])
def test_batchnorm_checkpoint_loads(layer, norm, affine, track):
    """Strictly, inside a network, and evaluation then gives what the batch normalization gave."""
    dims = LAYERS.index(layer) + 1
    theirs = nn.Sequential(norm(5, affine=affine, track_running_stats=track).double())
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        theirs(3 + 2 * torch.randn(8, 5, *[4] * dims, dtype=torch.float64))
    ours = nn.Sequential(
        layer(5, affine=affine, track_running_stats=track, affine_init="preserve", dtype=torch.float64)
    )
    checkpoint = theirs.state_dict()
    keys = list(checkpoint)
    ours.load_state_dict(checkpoint)
    assert list(checkpoint) == keys  # the caller's dictionary is the caller's
    if track:
        assert ours[0].num_batches_tracked == 3
        torch.testing.assert_close(ours[0].running_mean.mean(0), theirs[0].running_mean)
        if affine:
            x = torch.randn(8, 5, *[4] * dims, dtype=torch.float64)
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_batchnorm_checkpoint_with_an_error_is_still_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        CompoundBatchNorm2d(5).load_state_dict(nn.BatchNorm2d(6).state_dict())
    state = nn.BatchNorm2d(5).state_dict()
    del state["running_var"]
    with pytest.raises(RuntimeError, match=r"running_var|running_prior"):
        CompoundBatchNorm2d(5).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtype_moves(backend, dtype):
    layer = trained().to(dtype)
    assert {t.dtype for t in (*layer.parameters(), *(getattr(layer, n) for n in RUNNING))} == {dtype}
    assert layer.num_batches_tracked.dtype == torch.long
    y = layer(torch.randn(4, 5, 6, 6, dtype=dtype))
    y.sum().backward()
    assert y.dtype == layer.weight.grad.dtype == layer.running_var.dtype == dtype


@modes
def test_meta_device(responsibility):
    """Built or moved there it only tells shapes; filled again by reset_parameters."""
    layer = CompoundBatchNorm2d(5, responsibility=responsibility, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    for moved in (layer, trained(responsibility=responsibility).to("meta")):
        x = torch.randn(4, 5, 6, 6, device="meta", requires_grad=True)
        for training in (True, False):
            y = moved.train(training)(x)
            y.sum().backward()
            assert y.is_meta and y.shape == x.shape == x.grad.shape
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(4, 5, 6, 6)).isfinite().all()


# --- what backward keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [Case(), Case(training=False), Case(mode="split")], ids=str)
def test_only_x_is_saved(backend, case, dtype, layout):
    """Nothing of the input's size is kept but the input itself; all else is per channel or per image."""
    x = torch.randn(16, 8, 32, 32).to(dtype, memory_format=torch.channels_last if layout == "channels_last" else None)
    x.requires_grad_()
    layer = CompoundBatchNorm2d(8).train(case.training)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    groups = torch.arange(16) % 4
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if case.mode == "split":
            with cbn_ext.split_path(groups):
                y = layer(x)
        else:
            y = layer(x)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    inputs = storages.pop(x.untyped_storage().data_ptr())
    assert inputs == x.numel() * x.element_size()
    # Mass, mean and variance of the batch and of the mixture, weight and bias: a dozen (M, C) float32 tensors.
    assert sum(storages.values()) <= 12 * layer.weight.numel() * 4 + groups.nbytes
    y.sum().backward()


def test_two_forwards_before_one_backward(backend):
    """The running statistics move in between; each backward uses those that its forward used."""
    layer = CompoundBatchNorm2d(5, dtype=torch.float64)
    batches = torch.randn(2, 4, 5, 6, 6, dtype=torch.float64)
    alone = copy.deepcopy(layer)
    for batch in batches:
        alone(batch).square().mean().backward()
    sum(layer(batch).square().mean() for batch in batches).backward()
    assert_close(layer.weight.grad, alone.weight.grad, "grad_affine", torch.float64)
    assert_close(layer.bias.grad, alone.bias.grad, "grad_affine", torch.float64)


@pytest.mark.parametrize("path", ["compound", "split"])
def test_step_is_the_functions_step(backend, path):
    """A layer adds nothing to the functions but the state it holds."""
    x, _, _, groups, prior, mean, var, weight, bias = Case(mode="split").arguments()
    layer = CompoundBatchNorm2d(5, momentum=MOMENTUM)
    layer.load_state_dict(
        {
            "running_prior": prior,
            "running_mean": mean,
            "running_var": var,
            "weight": weight,
            "bias": bias,
            "num_batches_tracked": torch.tensor(0),
        }
    )
    if path == "split":
        with cbn_ext.split_path(groups):
            y = layer(x)
        expected = cbn_ext.split_batch_norm(x, groups, mean, var, weight, bias, momentum=MOMENTUM)
    else:
        y = layer(x)
        expected = cbn_ext.compound_batch_norm(x, prior, mean, var, weight, bias, training=True, momentum=MOMENTUM)
    assert torch.equal(y, expected)
    assert torch.equal(layer.running_prior, prior)
    assert torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, var)
