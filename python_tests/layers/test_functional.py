"""The functions: signatures, arguments that do not fit, what is updated, the output's dtype and memory format."""

import inspect
import re

import pytest
import torch

import cbn_ext
from cbn_ext import compound_batch_norm, split_batch_norm
from python_tests.support.cases import Case, with_layout

N, C, M = 4, 3, 2
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def arguments(dtype=torch.float32, **changed):
    """Keyword arguments of `compound_batch_norm` that fit, but for those `changed`."""
    fitting = {
        "input": torch.randn(N, C, 5, 5, dtype=dtype),
        "running_prior": torch.full((M, C), 1 / M, dtype=dtype),
        "running_mean": torch.randn(M, C, dtype=dtype),
        "running_var": torch.ones(M, C, dtype=dtype),
        "weight": torch.randn(M, C, dtype=dtype),
        "bias": torch.randn(M, C, dtype=dtype),
    }
    return {**fitting, **changed}


def split_arguments(**changed):
    fitting = arguments()
    del fitting["running_prior"]
    return {**fitting, "groups": torch.arange(N) % M, **changed}


def test_public_names():
    assert set(cbn_ext.__all__) >= {
        "CompoundBatchNorm1d",
        "CompoundBatchNorm2d",
        "CompoundBatchNorm3d",
        "compound_batch_norm",
        "split_batch_norm",
        "class_groups",
        "split_path",
        "convert_compound_batchnorm",
        "use_backend",
        "build_info",
    }


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            compound_batch_norm,
            "(input, running_prior, running_mean, running_var, weight, bias, training=False, momentum=0.1, eps=1e-05, "
            "responsibility='channel', detach_responsibility=False, residual=None, activation=None)",
        ),
        (
            split_batch_norm,
            "(input, groups, running_mean, running_var, weight, bias, momentum=0.1, eps=1e-05, "
            "residual=None, activation=None)",
        ),
        (cbn_ext.class_groups, "(num_classes, num_groups, order='contiguous')"),
        (cbn_ext.split_path, "(groups)"),
    ],
    ids=["compound_batch_norm", "split_batch_norm", "class_groups", "split_path"],
)
def test_signature(function, expected):
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == expected


def test_a_step_reads_no_signature(backend, monkeypatch):
    """torch binds the arguments of an autograd.Function to its forward's signature in each call."""
    x = torch.randn(N, C, 5, 5, requires_grad=True)
    names = []
    original = inspect.Parameter.__init__

    def init(self, name, *arguments, **options):
        names.append(name)
        original(self, name, *arguments, **options)

    monkeypatch.setattr(inspect.Parameter, "__init__", init)
    compound_batch_norm(**arguments(input=x), training=True).sum().backward()
    assert not names and x.grad is not None
    inspect.signature(arguments)
    assert names == ["dtype", "changed"]  # what would have been noticed


# --- what is updated


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_running_statistics_move_in_place_in_training_only(backend, training):
    given = arguments()
    running = [given[name] for name in ("running_prior", "running_mean", "running_var")]
    before = [t.clone() for t in running]
    inputs = {name: given[name].clone() for name in ("input", "weight", "bias")}
    compound_batch_norm(**given, training=training)
    for now, then in zip(running, before, strict=True):
        assert torch.equal(now, then) is not training
    assert all(torch.equal(given[name], value) for name, value in inputs.items())


def test_momentum_0_and_1(backend):
    given = arguments()
    running = [given[name] for name in ("running_prior", "running_mean", "running_var")]
    before = [t.clone() for t in running]
    compound_batch_norm(**given, training=True, momentum=0.0)
    assert all(torch.equal(now, then) for now, then in zip(running, before, strict=True))
    compound_batch_norm(**given, training=True, momentum=1.0)
    torch.testing.assert_close(running[0].sum(0), torch.ones(C))  # the batch's shares, no trace of the start
    torch.testing.assert_close((running[0] * running[1]).sum(0), given["input"].mean((0, 2, 3)))


def test_momentum_as_a_tensor(backend):
    number = arguments()
    tensor = {name: value.clone() for name, value in number.items()}
    compound_batch_norm(**number, training=True, momentum=0.3)
    compound_batch_norm(**tensor, training=True, momentum=torch.tensor(0.3))
    for name in ("running_prior", "running_mean", "running_var"):
        torch.testing.assert_close(tensor[name], number[name])


@pytest.mark.parametrize("responsibility", ["channel", "joint"])
@pytest.mark.parametrize("components", [1, 3])
def test_without_running_statistics(backend, responsibility, components):
    """In training they may all be None: M is the affine pair's, or 1, and the start mixture gives the posteriors."""
    x = 2 + 3 * torch.randn(N, C, 5, 5)
    weight, bias = torch.randn(2, components, C)
    y = compound_batch_norm(x, None, None, None, weight, bias, training=True, responsibility=responsibility)
    plain = compound_batch_norm(x, None, None, None, None, None, training=True, responsibility=responsibility)
    assert y.isfinite().all()
    torch.testing.assert_close(plain, torch.nn.functional.batch_norm(x, None, None, training=True))
    if components == 1:
        expected = torch.nn.functional.batch_norm(x, None, None, weight[0], bias[0], training=True)
        torch.testing.assert_close(y, expected)


def test_weight_or_bias_alone(backend):
    running = ("running_prior", "running_mean", "running_var")
    for name, neutral in (("weight", torch.ones(M, C)), ("bias", torch.zeros(M, C))):
        given = arguments()
        copies = {key: given[key].clone() for key in running}
        y = compound_batch_norm(**{**given, name: None}, training=True)
        torch.testing.assert_close(y, compound_batch_norm(**{**given, **copies, name: neutral}, training=True))


# --- output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((4, 3, 5, 6), "contiguous"),
        ((4, 3, 5, 6), "channels_last"),
        ((2, 3, 4, 5, 6), "contiguous"),
        ((2, 3, 4, 5, 6), "channels_last_3d"),
    ],
)
@pytest.mark.parametrize("grad_format", ["same", "contiguous"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dtype_and_memory_format(backend, dtype, shape, memory_format, grad_format, training):
    """Output and input gradient are like the input, whatever the memory format of the gradient that comes."""
    memory_format = FORMATS[memory_format]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    given = arguments(state_dtype)
    given["input"] = torch.randn(shape).to(dtype, memory_format=memory_format).requires_grad_()
    y = compound_batch_norm(**given, training=training)
    assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    grad = torch.randn(shape).to(dtype)
    grad = grad.contiguous(memory_format=memory_format) if grad_format == "same" else grad
    grad_input = torch.autograd.grad(y, given["input"], grad)[0]
    assert grad_input.dtype == dtype and grad_input.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_input_without_a_memory_format_gives_a_contiguous_output(backend, layout):
    x = with_layout(torch.randn(N, C, 5, 6), layout)
    assert not x.is_contiguous()
    assert compound_batch_norm(**arguments(input=x), training=True).is_contiguous()


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
@pytest.mark.parametrize("name", ["running_prior", "running_mean", "running_var", "weight", "bias"])
def test_non_contiguous_statistics(backend, layout, name):
    """Running statistics and parameters that are views of something else are read, and updated, in place."""
    case = Case(components=4, shape=(4, 6, 5, 5))
    x, _, _, _, *state, weight, bias = case.arguments()
    names = ("running_prior", "running_mean", "running_var", "weight", "bias")
    plain = dict(zip(names, (*state, weight, bias), strict=True))
    strided = {key: value.clone() for key, value in plain.items()}
    strided[name] = with_layout(plain[name], layout)
    assert not strided[name].is_contiguous()
    expected = compound_batch_norm(x, **plain, training=True)
    assert torch.equal(compound_batch_norm(x, **strided, training=True), expected)
    assert all(torch.equal(strided[key], plain[key]) for key in names)


# --- arguments that do not fit


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"responsibility": "pixel"}, ValueError, "channel.*joint.*pixel"),
        ({"input": torch.ones(N, C, 5, 5, dtype=torch.int64)}, NotImplementedError, "int64"),
        ({"input": torch.randn(N, 7, 5, 5)}, RuntimeError, "7.*3|3.*7"),
        ({"input": torch.randn(5)}, ValueError, "1D"),
        ({"running_prior": torch.ones(M)}, RuntimeError, r"running_prior.*\(2, 3\).*\(2,\)"),
        ({"running_prior": torch.ones(3, C)}, RuntimeError, r"running_prior.*\(2, 3\).*\(3, 3\)"),
        (
            {"running_prior": torch.ones(M, C), "responsibility": "joint"},
            RuntimeError,
            r"running_prior.*\(2,\).*\(2, 3\)",
        ),
        ({"running_mean": torch.zeros(C)}, RuntimeError, r"running_mean.*\(3,\)"),
        ({"running_var": torch.ones(M, 7)}, RuntimeError, r"running_var.*\(2, 3\).*\(2, 7\)"),
        ({"weight": torch.ones(C)}, RuntimeError, r"weight.*\(2, 3\).*\(3,\)"),
        ({"bias": torch.ones(3, C)}, RuntimeError, r"bias.*\(2, 3\).*\(3, 3\)"),
        ({"weight": torch.ones(M, C, dtype=torch.float64)}, RuntimeError, "weight.*float32.*float64"),
        (
            {"running_var": torch.ones(M, C, dtype=torch.float16)},
            RuntimeError,
            "running_var.*float32.*float16",
        ),
        ({"bias": torch.ones(M, C, device="meta")}, RuntimeError, "bias.*cpu.*meta"),
        ({"running_mean": torch.zeros(M, C, device="meta")}, RuntimeError, "running_mean.*cpu.*meta"),
        ({"running_prior": None}, RuntimeError, "running_prior"),
        ({"running_mean": None, "running_var": None}, RuntimeError, "running_mean"),
    ],
)
def test_compound_arguments_that_do_not_fit(backend, training, changed, error, message):
    """The message names the argument, what was expected and what came."""
    with pytest.raises(error, match=message) as raised:
        compound_batch_norm(**arguments(**changed), training=training)
    assert raised.type is error


def test_evaluation_needs_running_statistics(backend):
    with pytest.raises(RuntimeError, match="running_mean"):
        compound_batch_norm(**arguments(running_prior=None, running_mean=None, running_var=None), training=False)


@pytest.mark.parametrize("components", [0, 17])
def test_number_of_components_out_of_range(backend, components):
    state = torch.ones(components, C)
    given = arguments(running_prior=state, running_mean=state, running_var=state, weight=None, bias=None)
    with pytest.raises((RuntimeError, ValueError), match=rf"1.*16.*{components}"):
        compound_batch_norm(**given)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input": torch.ones(N, C, 5, 5, dtype=torch.int64)}, NotImplementedError, "int64"),
        ({"input": torch.randn(N, 7, 5, 5)}, RuntimeError, "7.*3|3.*7"),
        ({"running_var": torch.ones(M, 7)}, RuntimeError, r"running_var.*\(2, 3\).*\(2, 7\)"),
        ({"weight": torch.ones(C)}, RuntimeError, r"weight.*\(2, 3\).*\(3,\)"),
        ({"bias": torch.ones(M, C, dtype=torch.float64)}, RuntimeError, "bias.*float32.*float64"),
        ({"groups": torch.zeros(N + 1, dtype=torch.long)}, (RuntimeError, ValueError), "4.*5"),
    ],
)
def test_split_arguments_that_do_not_fit(backend, changed, error, message):
    with pytest.raises(error, match=message):
        split_batch_norm(**split_arguments(**changed))


def test_one_value_per_channel(backend):
    x = torch.randn(1, C, 1, 1)
    message = re.escape(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    with pytest.raises(ValueError, match=message):
        compound_batch_norm(**arguments(input=x), training=True)
    with pytest.raises(ValueError, match=message):
        split_batch_norm(**split_arguments(input=x, groups=torch.zeros(1, dtype=torch.long)))
    assert compound_batch_norm(**arguments(input=x)).shape == x.shape
