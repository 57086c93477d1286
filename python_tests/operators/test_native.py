"""The native CPU operators: results, opcheck, formats without copies, threads, instruction sets, huge tensors."""

import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cbn_ext
from cbn_ext import compound_batch_norm
from python_tests.support import ROOT, cases, oracle
from python_tests.support.cases import (
    CASES,
    EPS,
    MOMENTUM,
    Case,
    assert_results,
    backward_arguments,
    expected,
    forward_arguments,
    run,
)
from python_tests.support.tolerances import assert_close

OPS = torch.ops.cbn_ext


@pytest.fixture(autouse=True)
def _native():
    with cbn_ext.use_backend("native"):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case):
    assert_results(run(case, "native"), expected(case), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    assert_results(run(case, "native"), run(case, "reference"), case, storage_roundings=2)


@pytest.mark.parametrize("components", range(1, 17))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_number_of_components(components, layout, training):
    case = Case((3, 20, 5, 7), components, training=training, layout=layout)
    assert_results(run(case, "native"), expected(case), case)


# --- the operators themselves


ARGUMENTS = {"forward": forward_arguments, "backward": backward_arguments}
OPCHECK_CASES = [
    Case(),
    Case(training=False),
    Case(mode="split"),
    Case(components=3, detach=True),
    Case(components=1, affine=False, dtype=torch.float64),
    Case(dtype=torch.bfloat16, layout="channels_last"),
    Case(dtype=torch.float16, layout="sliced"),
    Case(shape=(2, 3, 3, 4, 5), layout="channels_last", grad_layout="contiguous"),
    Case(shape=(5, 3, 7), layout="channels_last"),
    Case(shape=(19, 3), layout="channels_last"),
    Case(layout="expanded"),
    Case(layout="transposed"),
    Case(shape=(0, 3, 4, 4)),
    Case(residual=True),
    Case(activation="relu", training=False),
    Case(activation="relu", residual=True),
    Case(activation="relu", residual=True, mode="split", dtype=torch.bfloat16),
    Case(activation="relu", residual=True, layout="channels_last", grad_layout="sliced"),
    Case(activation="relu", residual=True, shape=(0, 3, 4, 4)),
    Case(mode="joint"),
    Case(mode="joint", components=1, training=False),
    Case(mode="joint", activation="relu", residual=True, layout="channels_last", dtype=torch.bfloat16),
    Case(mode="joint", shape=(0, 3, 4, 4)),
]


@pytest.mark.parametrize("operator", ARGUMENTS)
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck(operator, case):
    torch.library.opcheck(getattr(OPS, operator).default, ARGUMENTS[operator](case))


@pytest.mark.parametrize("mode", ["channel", "split", "joint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_update_running(mode, dtype):
    x, _, _, prior, mean, var, *_ = arguments = forward_arguments(Case(mode=mode, dtype=dtype))
    _, _, _, batch, _ = OPS.forward(*arguments)
    points = x.numel() // x.shape[1]
    torch.library.opcheck(OPS.update_running.default, (prior, mean, var, batch, points, MOMENTUM))


@pytest.mark.parametrize("prior", [None, torch.rand(4), torch.rand(4, 3)], ids=["none", "joint", "channel"])
def test_opcheck_stacked(prior):
    torch.library.opcheck(OPS.stacked.default, (prior, torch.randn(4, 3), torch.rand(4, 3)))


@pytest.mark.parametrize("case", [c for c in OPCHECK_CASES if c.training and c.shape[0]], ids=str)
def test_forward_returns_the_batch_statistics(case):
    x, _, groups, prior, mean, var, weight, bias, *_ = arguments = forward_arguments(case)
    y, mask, running, (mass, batch_mean, batch_var), posterior = OPS.forward(*arguments)
    words = -(-x.numel() // 32) if case.activation and case.residual else 0
    assert mask.shape == (4 * words,) and mask.dtype == torch.uint8
    used_prior = torch.zeros_like(mean) if prior is None else prior.reshape(len(mean), -1).expand(mean.shape)
    for copy, used in zip(running, (used_prior, mean, var), strict=True):
        assert torch.equal(copy, used) and copy.data_ptr() != used.data_ptr()
    responsibility = "joint" if case.mode == "joint" else "channel"
    step = oracle.train_step(x, prior, mean, var, weight, bias, groups=groups, eps=EPS, responsibility=responsibility)
    joint = case.mode == "joint" and case.components > 1
    assert posterior.shape == ((len(mean), len(x), x[0, 0].numel()) if joint else (0,))
    if joint:
        torch.testing.assert_close(posterior.sum(0), torch.ones_like(posterior[0]))
        assert_close(posterior.sum((1, 2)), step.mass[:, 0], "statistics", case.dtype)
    expected_y = step.y if arguments[1] is None else step.y + arguments[1]
    assert_close(y, expected_y.relu() if case.activation else expected_y, "output", case.dtype)
    assert_close(mass, step.mass, "statistics", case.dtype)
    assert_close(batch_var, step.var, "statistics", case.dtype)
    # A mean has the error of the deviations it averages, also where it is zero itself.
    deviation = step.var.sqrt()
    assert_close(1 + batch_mean / deviation, 1 + step.mean / deviation, "statistics", case.dtype)


def test_evaluation_returns_no_statistics():
    _, _, running, batch, _ = OPS.forward(*forward_arguments(Case(training=False)))
    assert batch.shape == (0,) and running.shape == (3, 4, 5)


def test_inputs_are_not_changed():
    for operator, arguments_of in ARGUMENTS.items():
        arguments = arguments_of(Case(mode="split", activation="relu", residual=True))
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        getattr(OPS, operator)(*arguments)
        for now, then in zip(arguments, before, strict=True):
            assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then


PLAIN, SPLIT, JOINT, MASKED = Case(), Case(mode="split"), Case(mode="joint"), Case(activation="relu", residual=True)


@pytest.mark.parametrize(
    ("operator", "case", "position", "wrong", "message"),
    [
        ("forward", PLAIN, 0, torch.ones(4, 5, 6, 7, dtype=torch.int32), "float32.*[Ii]nt"),
        ("forward", PLAIN, 0, torch.ones(5), r"\(5\)"),
        ("forward", PLAIN, 1, torch.ones(4, 5, 6, 1), r"residual.*\(4, 5, 6, 7\).*\(4, 5, 6, 1\)"),
        ("forward", PLAIN, 1, torch.ones(4, 5, 6, 7, dtype=torch.float64), "residual.*[Ff]loat.*[Dd]ouble"),
        ("forward", SPLIT, 2, torch.zeros(3, dtype=torch.int64), r"groups.*\(4\).*\(3\)"),
        ("forward", SPLIT, 2, torch.zeros(4), "groups.*Long.*[Ff]loat"),
        ("forward", SPLIT, 2, None, "groups in mode 1.*none"),
        ("forward", PLAIN, 2, torch.zeros(4, dtype=torch.int64), "groups in mode 1.*in mode 0"),
        ("forward", PLAIN, 8, 3, "mode 0.*1.*2.*got 3"),
        ("forward", JOINT, 3, torch.ones(4, 5), r"prior.*\(4\).*\(4, 5\)"),
        ("forward", JOINT, 3, None, "prior"),
        ("forward", PLAIN, 3, None, "prior"),
        ("forward", PLAIN, 4, torch.zeros(17, 5), "components.*16.*17"),
        ("forward", PLAIN, 4, torch.zeros(5), r"\(5\)"),
        ("forward", PLAIN, 5, torch.ones(4, 6), r"var.*\(4, 5\).*\(4, 6\)"),
        ("forward", PLAIN, 5, torch.ones(4, 5, dtype=torch.float64), "var.*[Ff]loat.*[Dd]ouble"),
        ("forward", PLAIN, 6, torch.ones(3, 5), r"weight.*\(4, 5\).*\(3, 5\)"),
        ("forward", PLAIN, 7, torch.ones(4, 5, dtype=torch.float16), "bias.*[Ff]loat.*[Hh]alf"),
        ("backward", PLAIN, 0, torch.ones(4, 5, 6, 8), r"grad.*\(4, 5, 6, 7\).*\(4, 5, 6, 8\)"),
        ("backward", PLAIN, 0, torch.ones(4, 5, 6, 7, dtype=torch.float64), "grad.*[Ff]loat.*[Dd]ouble"),
        ("backward", PLAIN, 2, torch.zeros(105, dtype=torch.uint8), "no mask without relu"),
        ("backward", PLAIN, 4, torch.ones(4, 4, 42), r"posterior.*\(0\).*\(4, 4, 42\)"),
        ("backward", JOINT, 4, torch.ones(0), r"posterior.*\(4, 4, 42\).*\(0\)"),
        ("backward", JOINT, 4, torch.ones(4, 4, 42).double(), "posterior.*[Ff]loat.*[Dd]ouble"),
        ("backward", PLAIN, 5, torch.ones(3, 17, 5), "components.*16.*17"),
        ("backward", PLAIN, 5, torch.ones(3, 4, 6), r"running.*\(3, 4, 5\).*\(3, 4, 6\)"),
        ("backward", PLAIN, 6, torch.ones(3, 3, 5), r"batch.*\(3, 4, 5\).*\(3, 3, 5\)"),
        ("backward", PLAIN, 6, torch.ones(3, 4, 5, dtype=torch.float64), "batch.*[Ff]loat.*[Dd]ouble"),
        ("backward", MASKED, 2, torch.zeros(104, dtype=torch.uint8), r"mask.*\(108\).*\(104\)"),
        ("backward", MASKED, 2, torch.zeros(108, dtype=torch.int8), "mask.*[Cc]har"),
    ],
)
def test_refuses_what_does_not_fit(operator, case, position, wrong, message):
    """Also when called directly: a wrong shape must not become a read out of bounds."""
    arguments = list(ARGUMENTS[operator](case))
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        getattr(OPS, operator)(*arguments)


@pytest.mark.parametrize(("position", "name"), [(0, "prior"), (2, "var"), (3, "batch")])
def test_update_refuses_what_does_not_fit(position, name):
    arguments = [torch.ones(4, 5), torch.ones(4, 5), torch.ones(4, 5), torch.ones(3, 4, 5)]
    arguments[position] = arguments[position][..., :4]
    with pytest.raises(RuntimeError, match=rf"{name}.*4, 5\).*4, 4\)"):
        OPS.update_running(*arguments, 10, MOMENTUM)


# --- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((8, 16, 24, 24), torch.contiguous_format),
        ((8, 16, 24, 24), torch.channels_last),
        ((4, 16, 4, 12, 24), torch.contiguous_format),
        ((4, 16, 4, 12, 24), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("mode", ["channel", "split", "joint"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_no_copy_of_the_input(dtype, shape, memory_format, mode, fused):
    """Neither contiguous nor channels_last inputs, nor their gradients, are copied or converted, in any dtype."""
    x = torch.randn(shape).to(dtype, memory_format=memory_format).requires_grad_()
    grad = torch.randn(shape).to(dtype, memory_format=memory_format)
    residual = grad.clone().requires_grad_() if fused else None
    state = torch.float64 if dtype == torch.float64 else torch.float32
    layer = {4: cbn_ext.CompoundBatchNormAct2d, 5: cbn_ext.CompoundBatchNormAct3d}[x.ndim](
        16,
        dtype=state,
        activation="relu" if fused else None,
        responsibility="joint" if mode == "joint" else "channel",
    )
    groups = torch.arange(shape[0]) % 4

    def step():
        if mode == "split":
            with cbn_ext.split_path(groups):
                layer(x, residual).backward(grad)
        else:
            layer(x, residual).backward(grad)

    step()
    x.grad = None
    if fused:
        residual.grad = None
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, acc_events=True
    ) as profiler:
        step()
    copies = [e for e in profiler.events() if e.name == "aten::copy_" and list(shape) in e.input_shapes]
    assert not copies
    # Nothing else of the input's size is allocated but the output and the gradients of x and the residual; in joint
    # mode the points' weights and their gradient, which are as many as a quarter of the input's elements here, each.
    size = x.numel() * x.element_size()
    weights = 2 * layer.num_components * (x.numel() // 16) * (state.itemsize) if mode == "joint" else 0
    large = [e for e in profiler.events() if e.self_cpu_memory_usage >= size // 2]
    assert sum(e.self_cpu_memory_usage for e in large) <= (3 if fused else 2) * size + weights + 4096


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["channel", "split", "joint"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_operators_of_a_step(layout, mode, fused):
    """Arguments that fit are not converted, nor is torch asked to: at small sizes each call of it would show."""
    x, grad, residual, groups, *_ = Case(mode=mode, layout=layout, residual=fused).arguments()
    responsibility = "joint" if mode == "joint" else "channel"
    layer = cbn_ext.CompoundBatchNormAct2d(5, activation="relu" if fused else None, responsibility=responsibility)
    x.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        if mode == "split":
            with cbn_ext.split_path(groups):
                y = layer(x, residual)
        else:
            y = layer(x, residual)
        y.backward(grad)
    called = {e.name for e in profiler.events() if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")}
    assert {name for name in called if name.startswith(("aten::", "cbn_ext::"))} == {
        "aten::add_",  # the batch is counted
        "cbn_ext::forward",
        "cbn_ext::update_running",
        "cbn_ext::backward",
        "aten::empty_like",
        "aten::detach",  # a gradient becomes a leaf's
        *(["aten::new_zeros"] if fused else []),  # the mask
    }


# --- repeatability

DETERMINISM_CASES = [
    Case((16, 8, 56, 56), 4),
    Case((16, 8, 56, 56), 4, layout="channels_last"),
    Case((64, 3, 33, 31), 3, layout="channels_last", dtype=torch.bfloat16),
    Case((1, 1, 300, 301), 2),
    Case((16, 8, 28, 28), 4, "split"),
    Case((4096, 5), 4),
    Case((16, 8, 56, 56), 4, training=False),
    Case((16, 8, 55, 57), 4, activation="relu", residual=True),
    Case((16, 9, 55, 57), 4, activation="relu", residual=True, layout="channels_last"),
    Case((16, 9, 55, 57), 4, "joint", activation="relu"),
    Case((16, 67, 28, 28), 5, "joint", layout="channels_last"),
]


@pytest.mark.parametrize("case", DETERMINISM_CASES, ids=str)
def test_bitwise_repeatable(case, threads):
    """The same bits again, and for one, two and three threads: sums are cut by shape and merged in order."""
    first = run(case, "native")
    for count in (1, 2, 3, 2):
        threads(count)
        for again, then in zip(run(case, "native"), first, strict=True):
            assert (again is None and then is None) or torch.equal(again, then)


# --- instruction sets

# What this processor has, as torch sees it.
CAPABILITIES = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"]}.get(
    torch.backends.cpu.get_cpu_capability(), ["baseline", "avx2", "avx512"]
)

RUN_ALL = """
import sys, torch
from python_tests.support.cases import CASES, run
import cbn_ext
torch.save((cbn_ext.build_info()["isa"], [tuple(run(case, "native")) for case in CASES]), sys.argv[1])
"""


def in_process(code, capability, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "CBN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_matches_the_oracle(capability, tmp_path):
    """On the whole case table, in a process that is held to this instruction set."""
    file = tmp_path / "results.pt"
    process = in_process(RUN_ALL, capability, str(file))
    assert process.returncode == 0, process.stderr
    used, results = torch.load(file)
    assert used == capability
    for case, result in zip(CASES, results, strict=True):
        assert_results(cases.Results(*result), expected(case), case)


def test_unknown_instruction_set_is_refused():
    process = in_process("import cbn_ext; cbn_ext.CompoundBatchNorm1d(2)(__import__('torch').randn(3, 2))", "sse9")
    assert process.returncode != 0 and "CBN_CPU_CAPABILITY" in process.stderr and "sse9" in process.stderr


# --- huge


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_bytes(layout, threads):
    """Three images are repeated and a fourth put at the end: the oracle needs these four, with their multiplicities.

    An image has an odd number of points, so that an offset that wrapped around would find other values.
    """
    threads(2)
    copies, size = 201, (32, 167, 167)
    images = torch.randn(4, *size) * torch.linspace(0.5, 2, 32).view(32, 1, 1) + 1
    images[3] = 3 * images[3] - 4
    times = torch.tensor([copies, copies, copies, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    prior, mean, var, weight, bias = (
        torch.tensor(pair).view(2, 1).repeat(1, size[0])
        for pair in ([0.4, 0.6], [0.5, 1.5], [1.0, 2.0], [1.0, -0.5], [0.0, 1.0])
    )

    exact = images.double().requires_grad_()
    p = oracle.posterior(exact, *oracle.double(prior, mean, var), EPS)
    mass, batch_mean, batch_var = oracle.moments(exact, times * p)
    wanted = oracle.combine(exact, p, batch_mean, batch_var, *oracle.double(weight, bias), EPS)
    wanted_grad = torch.autograd.grad(wanted, exact, times * exact.detach())[0] / times
    wanted = wanted.detach()
    del p

    count = 3 * copies + 1
    x = torch.empty(count, *size)
    if layout == "channels_last":
        x = torch.empty(count, *size[1:], size[0]).movedim(3, 1)
    x[:-1].unflatten(0, (copies, 3))[:] = images[:3]
    x[-1] = images[3]
    assert x.numel() * x.element_size() > 2**31
    x.requires_grad_()

    def assert_images_close(result, wanted, quantity):
        for first, kinds in ((0, [0, 1, 2]), (3 * (copies // 2), [0, 1, 2]), (count - 3, [1, 2, 3])):
            assert_close(result[first : first + 3], wanted[kinds], quantity, x.dtype)

    y = compound_batch_norm(x, prior, mean, var, weight, bias, training=True, momentum=1.0)
    assert_close(prior, (mass / mass.sum(0)).detach(), "statistics", x.dtype)
    assert_close(mean, batch_mean, "statistics", x.dtype)
    assert_close(var, batch_var * mass / (mass - 1), "statistics", x.dtype)
    assert_images_close(y.detach(), wanted, "output")
    output = torch.autograd.graph.get_gradient_edge(y)
    del y  # its memory is the gradient's
    assert_images_close(torch.autograd.grad(output, x, x.detach())[0], wanted_grad, "grad_input")
