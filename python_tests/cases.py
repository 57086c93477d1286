"""The one case table: every backend, instruction set and thread count is compared on these cases.

A case is named by what it is, its data are drawn from a seed made of that name, and its mixture is fitted to the data
so loosely that the responsibilities are really mixed.
"""

import functools
import math
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import oracle
import torch
from tolerances import assert_close
from torch import Tensor

from cbn_ext import compound_batch_norm, split_batch_norm, use_backend

EPS = 1e-5
MOMENTUM = 0.9  # so that the running statistics show the error of the batch's


class Arguments(NamedTuple):
    """What the operators take: x and grad (N, C, S...), groups (N,), the rest (M, C), prior (M,) in joint mode."""

    x: Tensor
    grad: Tensor
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
    grad_layout: str | None = None  # None: the input's
    affine: bool = True
    detach: bool = False
    data: str = "mixed"  # or one of the special mixtures that `arguments` makes

    def __str__(self) -> str:
        default = Case()
        changed = [
            f"{name}={str(value).removeprefix('torch.')}".replace(" ", "")
            for name, value in vars(self).items()
            if name not in ("shape", "components", "mode", "training") and value != getattr(default, name)
        ]
        shape = "x".join(map(str, self.shape))
        return "-".join([self.mode, "train" if self.training else "eval", shape, f"M{self.components}", *changed])

    def arguments(self) -> Arguments:
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        channels, m = self.shape[1], self.components

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)

        offset, spread = normal(channels), uniform(0.5, 2, channels)
        if self.data == "offset":
            offset = 1e4 * spread
        per_channel = (1, channels, *[1] * (len(self.shape) - 2))
        # Groups differ in their mean, so that a wrong group or component is noticed.
        groups = torch.randint(m, self.shape[:1], generator=generator)
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

        state = self.state_dtype or (torch.float64 if self.dtype == torch.float64 else torch.float32)
        return Arguments(
            with_layout(x.to(self.dtype), self.layout),
            with_layout(grad.to(self.dtype), self.grad_layout or self.layout),
            groups if self.mode == "split" else None,
            *(None if t is None else t.to(state) for t in (prior, mean, var, weight, bias)),
        )


@functools.cache
def expected(case: Case) -> Results:
    """The oracle's results in float64."""
    x, grad, groups, prior, mean, var, weight, bias = case.arguments()
    leaves = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    x, weight, bias = leaves if case.affine else (*leaves, None, None)
    responsibility = "joint" if case.mode == "joint" else "channel"
    options = {"eps": EPS, "responsibility": responsibility, "detach_responsibility": case.detach}
    running = (None, None, None)
    if case.training:
        step = oracle.train_step(x, prior, mean, var, weight, bias, groups=groups, momentum=MOMENTUM, **options)
        y, running = step.y, (step.running_prior, step.running_mean, step.running_var)
    else:
        y = oracle.evaluate(x, prior, mean, var, weight, bias, **options)
    grads = torch.autograd.grad(y, leaves, grad.double())
    grads = grads if case.affine else (*grads, None, None)
    return Results(y.detach(), *grads, *running)


def run(case: Case, backend: str) -> Results:
    """The results of the public functions."""
    x, grad, groups, *running, weight, bias = case.arguments()
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    with use_backend(backend):
        if groups is not None:
            y = split_batch_norm(x, groups, *running[1:], weight, bias, MOMENTUM, EPS)
        else:
            responsibility = "joint" if case.mode == "joint" else "channel"
            y = compound_batch_norm(
                x, *running, weight, bias, case.training, MOMENTUM, EPS, responsibility, case.detach
            )
        grads = torch.autograd.grad(y, leaves, grad)
    grads = grads if case.affine else (*grads, None, None)
    return Results(y.detach(), *grads, *(running if case.training else (None, None, None)))


QUANTITIES = Results("output", "grad_input", "grad_affine", "grad_affine", "statistics", "statistics", "statistics")


def assert_results(
    actual: Results, wanted: Results, case: Case, storage_roundings: int = 1, amplification: float = 1
) -> None:
    """Fail unless both hold the same results within the tolerance table."""
    if case.mode == "joint":
        # l is a sum over the channels; 8 of them still fit the allowance for one.
        amplification *= max(1, case.shape[1] / 8)
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
        buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
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
    return cases


CASES = _table()
NATIVE_CASES = [case for case in CASES if case.mode != "joint"]
