"""First and second derivatives in float64: against finite differences and against autograd through the oracle."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from cbn_ext import compound_batch_norm, split_batch_norm, use_backend
from python_tests.support import oracle
from python_tests.support.cases import EPS, MOMENTUM, Case
from python_tests.support.tolerances import assert_close

# Small enough for one finite difference per element; three points per image and channel, a component may be absent.
SHAPE = (4, 2, 3)
CHECKS = (gradcheck, gradgradcheck)

MODES = [
    ("native", "channel"),
    ("native", "split"),
    ("native", "joint"),
    ("reference", "channel"),
    ("reference", "joint"),
    ("reference", "split"),
]
PASSES = [
    (backend, mode, training) for backend, mode in MODES for training in (True, False) if training or mode != "split"
]
passes = pytest.mark.parametrize(
    ("backend_name", "mode", "training"),
    PASSES,
    ids=[f"{backend}-{mode}-{'train' if training else 'eval'}" for backend, mode, training in PASSES],
)


def layer_function(case):
    """y of (x, weight, bias), the running statistics held at the case's: every call gets copies to update."""
    _, _, _, groups, *running, _, _ = case.arguments()

    def function(x, weight=None, bias=None):
        state = [t.clone() for t in running]
        if case.mode == "split":
            return split_batch_norm(x, groups, *state[1:], weight, bias, MOMENTUM, EPS)
        return compound_batch_norm(x, *state, weight, bias, case.training, MOMENTUM, EPS, case.mode, case.detach)

    return function


def oracle_function(case):
    _, _, _, groups, *running, _, _ = case.arguments()
    options = {"eps": EPS, "detach_responsibility": case.detach}
    options["responsibility"] = "joint" if case.mode == "joint" else "channel"

    def function(x, weight=None, bias=None):
        if case.training:
            return oracle.train_step(x, *running, weight, bias, groups=groups, **options).y
        return oracle.evaluate(x, *running, weight, bias, **options)

    return function


def leaves(case):
    x, _, _, _, _, _, _, weight, bias = case.arguments()
    return [t.requires_grad_() for t in (x, weight, bias) if t is not None]


@passes
@pytest.mark.parametrize("components", [1, 2, 3, 4])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("check", CHECKS)
def test_finite_differences(backend_name, mode, training, components, affine, check):
    case = Case(SHAPE, components, mode, training, torch.float64, affine=affine)
    with use_backend(backend_name):
        assert check(layer_function(case), leaves(case))


@passes
@pytest.mark.parametrize("data", ["mixed", "dead"])
def test_finite_differences_without_mass(backend_name, mode, training, data):
    """A component that gets nothing of the batch leaves the derivatives right; here also in channels_last memory."""
    case = Case((3, 2, 2, 2), 3, mode, training, torch.float64, layout="channels_last", data=data)
    with use_backend(backend_name):
        assert all(check(layer_function(case), leaves(case)) for check in CHECKS)


@passes
@pytest.mark.parametrize("components", [1, 3, 4, 16])
@pytest.mark.parametrize("detach", [False, True], ids=["full", "detached"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_first_and_second_derivatives_are_the_oracles(backend_name, mode, training, components, detach, affine):
    """Also where finite differences do not apply: detached responsibilities are constants of every derivative."""
    case = Case((6, 3, 5), components, mode, training, torch.float64, detach=detach and mode != "split", affine=affine)
    grad = case.arguments().grad.requires_grad_()
    directions = [torch.randn_like(leaf) for leaf in leaves(case)]

    def derivatives(function):
        inputs = leaves(case)
        first = torch.autograd.grad(function(*inputs), inputs, grad, create_graph=True)
        along = sum((f * d).sum() for f, d in zip(first, directions, strict=True))
        return first, torch.autograd.grad(along, [grad, *inputs], materialize_grads=True)

    with use_backend(backend_name):
        first, second = derivatives(layer_function(case))
    wanted_first, wanted_second = derivatives(oracle_function(case))
    quantities = ["grad_input", "grad_affine", "grad_affine"]
    for actual, wanted, quantity in zip(first, wanted_first, quantities, strict=False):
        assert_close(actual, wanted, quantity, torch.float64)
    # A second derivative multiplies by l' and by 1/std once more.
    for actual, wanted, quantity in zip(second, wanted_second, ["grad_input", *quantities], strict=False):
        assert_close(actual, wanted, quantity, torch.float64, amplification=10)


def test_detaching_changes_the_gradient(backend):
    """The option does something: with mixed responsibilities the two readings differ by far more than rounding."""
    grads = []
    for detach in (False, True):
        case = Case(dtype=torch.float64)
        x, grad, _, _, *running, weight, bias = case.arguments()
        x.requires_grad_()
        y = compound_batch_norm(x, *running, weight, bias, True, detach_responsibility=detach)
        grads.append(torch.autograd.grad(y, x, grad)[0])
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[0].norm()


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_only_what_is_asked_for(backend, wanted, training):
    """Frozen parameters or an input that needs no gradient: the others' gradients stay the same."""
    case = Case(dtype=torch.float64, training=training)
    grad = case.arguments().grad
    function = layer_function(case)
    inputs = leaves(case)
    full = torch.autograd.grad(function(*inputs), inputs, grad)
    some = [leaf.requires_grad_(want) for leaf, want in zip(leaves(case), wanted, strict=True)]
    function(*some).backward(grad)
    for leaf, want, expected in zip(some, wanted, full, strict=True):
        assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


def test_no_graph_without_gradients(backend):
    function = layer_function(case := Case())
    assert not function(*case.arguments()[:1]).requires_grad
    with torch.no_grad():
        assert not function(*leaves(case)).requires_grad
