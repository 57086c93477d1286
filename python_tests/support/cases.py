"""The one case table: every backend, instruction set and thread count is compared on these cases.

A case is named by what it is, its data are drawn from a seed made of that name, and its mixture is fitted to the data
so loosely that the responsibilities are really mixed.
"""

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cbn_ext import Mode, compound_batch_norm, split_batch_norm, use_backend
from python_tests.support import oracle
from python_tests.support.tolerances import assert_close

EPS = 1e-5
MOMENTUM = 0.9  # so that the running statistics show the error of the batch's


class Arguments(NamedTuple):
    """What the operators take: x, grad and residual (N, C, S...), groups (N,), the rest (M, C), prior (M,) if joint."""

    x: Tensor
    grad: Tensor
    residual: Tensor | None
    groups: Tensor | None
    prior: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Results(NamedTuple):
    """What they give; statistics are None in evaluation, `running_prior` also in the split path."""

    y: Tensor
    grad_input: Tensor
    grad_residual: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    running_prior: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (4, 5, 6, 7)  # N, C, S...
    components: int = 4
    mode: str = "channel"  # "joint", "split"
    training: bool = True
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None  # None: float64 for float64, else float32
    layout: str = "contiguous"
    grad_layout: str | None = None  # of grad and residual; None: the input's
    affine: bool = True
    detach: bool = False
    activation: str | None = None
    residual: bool = False
    data: str = "mixed"  # or one of the special mixtures that `arguments` makes
    drawn_on: str = "cpu"  # the device that draws, with values of its own; "cuda" for data that take the host a minute

    def __str__(self) -> str:
        default = Case()
        changed = [
            f"{name}={str(value).removeprefix('torch.')}".replace(" ", "")
            for name, value in vars(self).items()
            if name not in ("shape", "components", "mode", "training") and value != getattr(default, name)
        ]
        shape = "x".join(map(str, self.shape))
        return "-".join([self.mode, "train" if self.training else "eval", shape, f"M{self.components}", *changed])

    def arguments(self, device: str = "cpu") -> Arguments:
        generator = torch.Generator(self.drawn_on).manual_seed(zlib.crc32(str(self).encode()))
        drawn = {"generator": generator, "device": self.drawn_on}
        channels, m = self.shape[1], self.components

        def normal(*size: int) -> Tensor:
            return torch.randn(size, dtype=torch.float64, **drawn)

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return low + (high - low) * torch.rand(size, dtype=torch.float64, **drawn)

        offset, spread = normal(channels), uniform(0.5, 2, channels)
        if self.data == "offset":
            offset = 1e4 * spread
        per_channel = (1, channels, *[1] * (len(self.shape) - 2))
        # Groups differ in their mean, so that a wrong group or component is noticed.
        groups = torch.randint(m, self.shape[:1], **drawn)
        between = groups.reshape(-1, *[1] * (len(self.shape) - 1)) / m
        x = offset.view(per_channel) + spread.view(per_channel) * (normal(*self.shape) + between)
        mean = offset + spread * 1.2 * normal(m, channels)
        var = spread**2 * uniform(0.3, 1.5, m, channels)
        prior = torch.softmax(normal(m) if self.mode == "joint" else normal(m, channels), 0)
        if self.data == "dead":  # component 0 gets no mass
            mean[0], var[0] = offset + 1e3 * spread, 0.1
            groups[groups == 0] = m - 1
        elif self.data == "lost":  # component 0 had lost its mass, and is the only one near the data
            mean[1:] += 5 * spread
            prior[0] = 0
        elif self.data == "equal":  # equal variances, as at the start: the log-odds are linear in x
            var[:] = spread**2 / 2
        elif self.data == "apart":  # odds between components that overflow where they do not matter
            mean += 20 * spread * normal(m, channels)
            var *= 10 ** uniform(-2, 2, m, channels)
        weight, bias = (1 + 0.5 * normal(m, channels), normal(m, channels)) if self.affine else (None, None)
        grad = normal(*self.shape)
        residual = normal(*self.shape) if self.residual else None

        x, grad, residual = (None if t is None else t.to(device, self.dtype) for t in (x, grad, residual))
        grad_layout = self.grad_layout or self.layout
        residual = None if residual is None else with_layout(residual, grad_layout)
        state = self.state_dtype or (torch.float64 if self.dtype == torch.float64 else torch.float32)
        result = Arguments(
            with_layout(x, self.layout),
            with_layout(grad, grad_layout),
            residual,
            groups.to(device) if self.mode == "split" else None,
            *(None if t is None else t.to(device, state) for t in (prior, mean, var, weight, bias)),
        )
        if self.activation is None:
            return result
        # Where rounding decides on which side of its kink a ReLU is, its gradient is all or nothing: none comes in
        # there, for no image, as they may share a gradient's memory.
        with torch.no_grad():
            near = output(self, result)[0].abs() < (1e-9 if self.dtype == torch.float64 else 2e-3)
        return result._replace(grad=with_layout(grad.masked_fill(near.any(0), 0), grad_layout))


def output(case: Case, arguments: Arguments) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The oracle's output before the activation, in float64, and the running statistics after a training step."""
    x, _, residual, groups, prior, mean, var, weight, bias = arguments
    responsibility = "joint" if case.mode == "joint" else "channel"
    options = {"eps": EPS, "responsibility": responsibility, "detach_responsibility": case.detach}
    running = (None, None, None)
    if case.training:
        step = oracle.train_step(x, prior, mean, var, weight, bias, groups=groups, momentum=MOMENTUM, **options)
        y, running = step.y, (step.running_prior, step.running_mean, step.running_var)
    else:
        y = oracle.evaluate(x, prior, mean, var, weight, bias, **options)
    return y if residual is None else y + residual, running


def gradients(y: Tensor, inputs: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """dL/d of those inputs that are there."""
    grads = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], grad))
    return [None if t is None else next(grads) for t in inputs]


def leaves(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """Those arguments that have a gradient become leaves, of another dtype or as they are."""
    names = ("x", "residual", "weight", "bias")
    given = {name: t for name in names if (t := getattr(arguments, name)) is not None}
    return arguments._replace(**{name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in given.items()})


@functools.cache
def expected(case: Case, device: str = "cpu") -> Results:
    """The oracle's results in float64, computed on `device`."""
    arguments = leaves(case.arguments(device), torch.float64)
    y, running = output(case, arguments)
    y = y.relu() if case.activation == "relu" else y
    inputs = (arguments.x, arguments.residual, arguments.weight, arguments.bias)
    return Results(y.detach(), *gradients(y, inputs, arguments.grad.double()), *running)


def run(case: Case, backend: str, device: str = "cpu") -> Results:
    """The results of the public functions, computed on `device`."""
    with use_backend(backend):
        results = results_of(case, leaves(case.arguments(device)))
    return Results(*(None if t is None else t.cpu() for t in results))


def results_of(case: Case, arguments: Arguments) -> Results:
    """The results of the public functions on the case's arguments, leaves, or on others like them."""
    x, grad, residual, groups, *running, weight, bias = arguments
    fused = {"residual": residual, "activation": case.activation}
    if groups is not None:
        y = split_batch_norm(x, groups, *running[1:], weight, bias, MOMENTUM, EPS, **fused)
    else:
        responsibility = "joint" if case.mode == "joint" else "channel"
        options = (case.training, MOMENTUM, EPS, responsibility, case.detach)
        y = compound_batch_norm(x, *running, weight, bias, *options, **fused)
    grads = gradients(y, (x, residual, weight, bias), grad)
    return Results(y.detach(), *grads, *(running if case.training else (None, None, None)))


def forward_arguments(case: Case, device: str = "cpu") -> tuple:
    """What the operator cbn_ext::forward takes."""
    a = case.arguments(device)
    prior = a.prior if a.groups is None else None
    tensors = (a.x, a.residual, a.groups, prior, a.mean, a.var, a.weight, a.bias)
    mode = {"channel": Mode.CHANNEL, "split": Mode.GROUPS, "joint": Mode.JOINT}[case.mode]
    return *tensors, int(mode), case.training, case.activation == "relu", EPS


def backward_arguments(case: Case, device: str = "cpu", place: Callable[[Tensor], Tensor] = Tensor.detach) -> tuple:
    """What cbn_ext::backward takes after a forward pass; its tensors of the input's size go through `place`."""
    x, residual, groups, _, _, _, weight, bias, mode, training, relu, eps = arguments = forward_arguments(case, device)
    _, mask, running, batch, posterior = torch.ops.cbn_ext.forward(*arguments)
    mask = mask if relu and residual is not None else None
    grad = place(case.arguments(device).grad)
    return grad, place(x), mask, groups, posterior, running, batch, weight, bias, mode, training, relu, case.detach, eps


QUANTITIES = Results(
    "output", "grad_input", "grad_input", "grad_affine", "grad_affine", "statistics", "statistics", "statistics"
)


def assert_results(
    actual: Results, wanted: Results, case: Case, storage_roundings: int = 1, amplification: float = 1
) -> None:
    """Fail unless both hold the same results within the tolerance table."""
    if case.mode == "joint":
        # l is a sum over the channels; 8 of them still fit the allowance for one.
        amplification *= max(1, case.shape[1] / 8)
        if case.data == "lost":
            amplification *= 2  # each channel's term is in the tens where p still matters
    if case.dtype == torch.float64 and case.data in ("lost", "equal"):
        amplification *= 2  # terms of l are in the tens, and their coefficients have the roundoff of float64 too
    if case.data == "apart":
        amplification *= 100  # as the terms of l, which are in the thousands
    # Sums and means of values of order one can cancel; their errors are measured against what is to be expected.
    points = math.prod(case.shape) // case.shape[1]
    usual = {"grad_weight": (points / case.components) ** 0.5, "running_mean": 0.5}
    usual["grad_bias"] = usual["grad_weight"]
    for name, a, w, quantity in zip(Results._fields, actual, wanted, QUANTITIES, strict=True):
        assert (a is None) == (w is None), name
        if a is not None:
            assert_close(a, w.double(), quantity, case.dtype, amplification, storage_roundings, usual.get(name, 0.0))


def with_layout(x: Tensor, layout: str) -> Tensor:
    """The values of x (N, C, S...) in other memory; "expanded" repeats the first image's values, with stride 0."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
    if layout == "channels_last" and x.ndim in channels_last:
        return x.contiguous(memory_format=channels_last[x.ndim])
    if layout == "channels_last":  # (N, C) has only one; (N, C, L) keeps L outside C
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        buffer[..., 1::2] = x
        return buffer[..., 1::2]
    if layout == "transposed":
        return x.mT.contiguous().mT if x.ndim > 2 else x.T.contiguous().T
    if layout == "expanded":
        return x[:1].clone().expand(x.shape)
    return x.contiguous()


def _table() -> list[Case]:
    float16, bfloat16, float64 = torch.float16, torch.bfloat16, torch.float64
    base = Case()
    compound = [
        replace(base, mode=mode, training=training) for mode in ("channel", "joint") for training in (True, False)
    ]
    modes = [*compound, replace(base, mode="split")]
    cases = list(modes)
    # Fast paths 1, 2, 4, 8 of the native operator, and the numbers between and above them.
    cases += [replace(mode, components=m) for mode in modes for m in (1, 2, 3, 5, 8, 16)]
    # One vector, its tails, several blocks; few and many channels, also channels_last, where C is the inner loop.
    shapes = [
        (19, 3),
        (33, 17),
        (5, 3, 7),
        (2, 3, 3, 4, 5),
        (1, 2, 5, 3),
        (3, 1, 1, 17),
        (2, 64, 3, 3),
        (7, 3, 64, 65),
    ]
    cases += [replace(mode, shape=shape) for mode in modes for shape in shapes]
    cases += [replace(mode, shape=shape, layout="channels_last") for mode in modes for shape in shapes]
    cases += [replace(mode, layout=layout) for mode in modes for layout in ("sliced", "transposed", "expanded")]
    cases += [
        replace(mode, grad_layout=grad_layout)
        for mode in modes
        for grad_layout in ("channels_last", "sliced", "transposed", "expanded")
    ]
    cases += [replace(mode, layout="channels_last", grad_layout="contiguous") for mode in modes]
    cases += [replace(mode, affine=False, components=m) for mode in modes for m in (1, 4)]
    cases += [replace(mode, detach=True, components=m) for mode in compound for m in (1, 3, 4)]
    cases += [replace(mode, dtype=dtype) for mode in modes for dtype in (float64, float16, bfloat16)]
    cases += [
        replace(mode, dtype=dtype, layout="channels_last", shape=(3, 24, 5, 5))
        for mode in modes
        for dtype in (float64, float16, bfloat16)
    ]
    cases += [replace(base, dtype=dtype, components=m) for dtype in (float64, bfloat16) for m in (1, 2, 8, 16)]
    cases += [replace(mode, dtype=dtype, state_dtype=dtype) for mode in modes for dtype in (float16, bfloat16)]
    cases += [replace(mode, data="dead") for mode in modes]
    cases += [
        replace(mode, data=data, dtype=dtype, components=m)
        for mode in compound
        for data in ("lost", "equal", "apart")
        for dtype in (torch.float32, float64)
        for m in (2, 3, 4, 8)
    ]
    return cases + _fused(modes, shapes[:-1])


def _fused(modes: list[Case], shapes: list[tuple[int, ...]]) -> list[Case]:
    """Cases with activation and residual; rows of a mask's bits begin and end anywhere in a byte."""
    forms = [{"activation": "relu"}, {"activation": "relu", "residual": True}]
    cases = [replace(mode, residual=True) for mode in modes]
    modes = [replace(mode, **form) for mode in modes for form in forms]
    cases += [replace(mode, components=m) for mode in modes for m in (1, 2, 3, 4, 8, 16)]
    cases += [
        replace(mode, shape=shape, layout=layout)
        for mode in modes
        for shape in [*shapes, (3, 24, 5, 5)]
        for layout in ("contiguous", "channels_last")
    ]
    cases += [
        replace(mode, shape=shape, layout=layout, dtype=dtype)
        for mode in modes
        for shape, layout in (((4, 5, 6, 7), "contiguous"), ((3, 24, 5, 5), "channels_last"))
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    ]
    cases += [replace(mode, layout=layout) for mode in modes for layout in ("sliced", "transposed", "expanded")]
    cases += [
        replace(mode, layout=layout, grad_layout=grad_layout)
        for mode in modes
        for layout, grad_layout in (
            ("contiguous", "channels_last"),
            ("channels_last", "contiguous"),
            ("contiguous", "sliced"),
            ("channels_last", "expanded"),
        )
    ]
    cases += [replace(mode, affine=False) for mode in modes]
    cases += [replace(mode, detach=True) for mode in modes if mode.mode != "split"]
    cases += [replace(mode, data=data) for mode in modes for data in ("dead", "equal")]
    cases += [replace(mode, dtype=torch.bfloat16, state_dtype=torch.bfloat16) for mode in modes]
    return cases


CASES = _table()
