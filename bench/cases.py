"""What the providers are measured on: a case, its tensors, and their results by the float64 reference."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cbn_ext import Mode, Options, reference

#: What is computed, as it stands in names: cbn(x), relu(cbn(x)), relu(cbn(x) + residual).
NORM, RELU, ADD_RELU = OPERATIONS = ("", " + ReLU", " + add + ReLU")

EPS = 1e-5

#: Largest relative L2 error against the float64 reference, of outputs and gradients alike.
ERROR_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

#: The same for gradients behind a ReLU at least: where y is all but 0, rounding decides whether they pass, and one
#: element of a million is a thousandth of the norm.
RELU_ERROR_LIMIT = 5e-3

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class WrongResultError(RuntimeError):
    """A provider computes something else than the reference; its time means nothing."""


def shape_label(shape: Sequence[int]) -> str:
    """A shape as a table has it."""
    return "x".join(map(str, shape))


def case_label(shape: str, dtype: str, layout: str, data: str = "mixed") -> str:
    """A case in a line of text."""
    return " ".join((shape, dtype, layout) if data == "mixed" else (shape, dtype, layout, data))


@dataclass(frozen=True)
class Case:
    """What is normalised.

    data: "mixed", components that share the responsibility; "saturated", each value far nearer to one component than to
    the others; "constant", every other channel constant.
    """

    shape: tuple[int, int, int, int]
    components: int = 4
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    data: str = "mixed"
    device: str = "cpu"

    @property
    def tensor_bytes(self) -> int:
        """Size of the input."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def labels(self) -> dict[str, str | int]:
        """The case's columns in a table."""
        shape, dtype = shape_label(self.shape), str(self.dtype).removeprefix("torch.")
        return {"shape": shape, "dtype": dtype, "layout": self.layout, "M": self.components, "data": self.data}

    def __str__(self) -> str:
        return case_label(**{key: value for key, value in self.labels.items() if key != "M"})


@dataclass(frozen=True)
class Problem:
    """The tensors of a case: x, grad_output, residual (N, C, H, W); groups (N,); the layer's state, name to (M, C)."""

    case: Case
    x: Tensor
    grad_output: Tensor
    residual: Tensor
    groups: Tensor
    state: dict[str, Tensor] = field(repr=False)

    def part(self, channels: slice | Tensor) -> "Problem":
        """The problem of some channels, without gradients: none depends on another."""
        x, grad_output, residual = (t.detach()[:, channels] for t in (self.x, self.grad_output, self.residual))
        state = {name: value[:, channels] for name, value in self.state.items()}
        return Problem(self.case, x, grad_output, residual, self.groups, state)


def make_problem(case: Case) -> Problem:
    """Random tensors, the same for equal cases; x does not depend on the number of components."""
    if case.data not in ("mixed", "saturated", "constant"):
        raise ValueError(f'expected data "mixed", "saturated" or "constant", got {case.data!r}')
    draw = {"generator": torch.Generator(case.device).manual_seed(0), "device": case.device}
    channels, m = case.shape[1], case.components
    # Everything that makes x is drawn before anything whose size depends on the number of components.
    x, grad_output, residual = (torch.randn(case.shape, **draw) for _ in range(3))
    shift, log_scale = 0.3 * torch.randn(2, channels, **draw)
    scale = log_scale.exp()
    if case.data == "saturated":
        x += 20 * torch.randint(4, case.shape, **draw)
    if case.data == "constant":
        x[:, ::2] = 0.5
    x = x.mul_(scale[:, None, None]).add_(shift[:, None, None])
    if case.data == "constant":
        # To eighths, of which sums are exact: rounding alone would differ by provider, times 1 / sqrt(eps).
        x[:, ::2] = (8 * x[:, ::2]).round() / 8

    # Statistics of the standardised data; components no further apart than a standard deviation or two.
    centers = torch.linspace(-1, 1, m, device=case.device) if m > 1 else torch.zeros(1, device=case.device)
    mean = centers[:, None] + 0.1 * torch.randn(m, channels, **draw)
    var = 0.5 + torch.rand(mean.shape, **draw)
    if case.data == "saturated":
        mean = 20.0 * torch.arange(m, device=case.device)[:, None].expand(m, channels)
    state = {
        "running_prior": torch.softmax(0.2 * torch.randn(mean.shape, **draw), 0),
        "running_mean": mean * scale + shift,
        "running_var": var * scale**2,
        "weight": 1 + 0.2 * torch.randn(mean.shape, **draw),
        "bias": 0.2 * torch.randn(mean.shape, **draw),
    }
    # As many images in each group, where their number allows it.
    groups = torch.randperm(case.shape[0], **draw) % m
    x, grad_output, residual = (
        t.to(case.dtype, memory_format=MEMORY_FORMATS[case.layout]) for t in (x, grad_output, residual)
    )
    state_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    state = {name: value.to(state_dtype) for name, value in state.items()}
    return Problem(case, x.requires_grad_(), grad_output, residual.requires_grad_(), groups, state)


def expected_results(
    problem: Problem,
    operation: str = NORM,
    mode: Mode = Mode.CHANNEL,
    output: Tensor | None = None,
    block_elements: int = 2**20,
) -> tuple[Tensor, ...]:
    """What a provider's step is to give, y and then the gradients, by the reference in float64.

    Channels are computed in blocks: the reference holds dozens of tensors as large as M inputs. With a ReLU the
    gradient passes where `output`, the provider's own y, is positive: near zero, rounding decides.
    """
    channels = problem.x.shape[1]
    width = channels if mode is Mode.JOINT else max(1, block_elements * channels // problem.x.numel())
    blocks = []
    for start in range(0, channels, width):
        part = problem.part(slice(start, start + width))
        x, grad = part.x.double().requires_grad_(), part.grad_output.double()
        *running, weight, bias = (value.double() for value in part.state.values())
        affine = weight.requires_grad_(), bias.requires_grad_()
        normalised = run_reference(x, *running, *affine, training=True, mode=mode, groups=part.groups)[0]
        y = _activate(normalised.detach(), part, operation)
        if operation != NORM:
            grad = torch.where(output[:, start : start + width] > 0, grad, 0)
        gradients = torch.autograd.grad(normalised, (x, *affine), grad)
        blocks.append((y, *gradients, *([grad] if operation == ADD_RELU else [])))
    return tuple(torch.cat(pieces, 1) for pieces in zip(*blocks, strict=True))


def expected_evaluation(problem: Problem, operation: str = NORM, mode: Mode = Mode.CHANNEL) -> Tensor:
    """A provider's output in evaluation mode, by the reference in float64."""
    state = (value.double() for value in problem.state.values())
    y, _ = run_reference(problem.x.detach().double(), *state, training=False, mode=mode)
    return _activate(y, problem, operation)


def run_reference(
    x: Tensor, *state: Tensor, training: bool, mode: Mode = Mode.CHANNEL, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y like x (N, C, H, W), and the batch's statistics (3, M, C), of a layer's state, (M, C) each."""
    prior, mean, var, weight, bias = state
    prior = joint_prior(prior) if mode is Mode.JOINT else prior
    groups = groups if mode is Mode.GROUPS else None
    options = Options(mode, training, relu=False, detach_responsibility=False, eps=EPS)
    y, _, _, batch, _ = reference.forward(x, None, groups, prior, mean, var, weight, bias, options)
    return y, batch


def joint_prior(prior: Tensor) -> Tensor:
    """The prior (M,) of joint mode: that of channel 0 of a state's (M, C)."""
    return prior[:, 0]


def _activate(y: Tensor, problem: Problem, operation: str) -> Tensor:
    if operation == ADD_RELU:
        y = y + problem.residual.detach()
    return y if operation == NORM else y.relu()


def check(name: str, case: Case, actual: Sequence[Tensor], expected: Sequence[Tensor], operation: str = NORM) -> None:
    """Compare what a provider gave (y, gradients; or the output in evaluation alone) with what it is to give.

    Raises:
        WrongResultError: an error above `ERROR_LIMIT`, for gradients above `RELU_ERROR_LIMIT` too where there is a
            ReLU, or not a number.
    """
    whats = ("y", "grad x", "grad weight", "grad bias", "grad residual")
    for what, value, right in zip(whats, actual, expected, strict=False):
        limit = ERROR_LIMIT[case.dtype]
        if what != "y" and operation != NORM:
            limit = max(limit, RELU_ERROR_LIMIT)
        error = ((value.double() - right).norm() / right.norm()).item()
        if not error <= limit:
            where = ", ".join(f"{key} {label}" for key, label in case.labels.items())
            raise WrongResultError(
                f"{name}, {where}: {what} differs from the float64 reference by {error:.3g} of its norm, "
                f"expected at most {limit:g}"
            )
