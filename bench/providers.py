"""The providers of a normalization, set up by one function on one problem, and the check of their results."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cbn_ext import CompoundBatchNorm2d, reference

OURS, BATCHNORM, BATCHNORM_COMPILED = "cbn_ext", "BatchNorm2d", "BatchNorm2d compiled"
REFERENCE, REFERENCE_COMPILED = "reference", "reference compiled"

EPS = 1e-5
#: Small enough that the running statistics, and with them the responsibilities, stay what they are for
#: thousands of steps; not 0, of which a compiler could make use.
MOMENTUM = 1e-6

#: Largest relative L2 error against the float64 reference, of outputs and gradients alike.
ERROR_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}

_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class WrongResultError(RuntimeError):
    """A provider computes something else than the reference; its time means nothing."""


@dataclass(frozen=True)
class Case:
    """What is normalised.

    data: "mixed", components that share the responsibility; "saturated", each value far nearer to one
    component than to the others; "constant", every other channel constant.
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
        return {
            "shape": "x".join(map(str, self.shape)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
            "M": self.components,
            "data": self.data,
        }


@dataclass(frozen=True)
class Problem:
    """The tensors of a case: x and grad_output (N, C, H, W); the layer's state, name to (M, C)."""

    case: Case
    x: Tensor
    grad_output: Tensor
    state: dict[str, Tensor] = field(repr=False)


def make_problem(case: Case) -> Problem:
    """Random tensors, the same for equal cases; x does not depend on the number of components."""
    if case.data not in ("mixed", "saturated", "constant"):
        raise ValueError(f'expected data "mixed", "saturated" or "constant", got {case.data!r}')
    generator = torch.Generator().manual_seed(0)
    channels, m = case.shape[1], case.components
    # Everything that makes x is drawn before anything whose size depends on the number of components.
    x = torch.randn(case.shape, generator=generator)
    grad_output = torch.randn(case.shape, generator=generator)
    cluster = torch.randint(4, case.shape, generator=generator)
    shift, log_scale = 0.3 * torch.randn(2, channels, generator=generator)
    scale = log_scale.exp()

    # Statistics of the standardised data; components no further apart than a standard deviation or two.
    centers = torch.linspace(-1, 1, m) if m > 1 else torch.zeros(1)
    mean = centers[:, None] + 0.1 * torch.randn(m, channels, generator=generator)
    var = 0.5 + torch.rand(mean.shape, generator=generator)
    if case.data == "saturated":
        x += 20 * cluster
        mean = 20.0 * torch.arange(m)[:, None].expand(m, channels)
    if case.data == "constant":
        x[:, ::2] = 0.5

    x = x * scale[:, None, None] + shift[:, None, None]
    if case.data == "constant":
        # To eighths, of which sums are exact: rounding alone would differ by provider, times 1 / sqrt(eps).
        x[:, ::2] = (8 * x[:, ::2]).round() / 8
    state = {
        "running_prior": torch.softmax(0.2 * torch.randn(mean.shape, generator=generator), 0),
        "running_mean": mean * scale + shift,
        "running_var": var * scale**2,
        "weight": 1 + 0.2 * torch.randn(mean.shape, generator=generator),
        "bias": 0.2 * torch.randn(mean.shape, generator=generator),
    }
    layout = {"device": case.device, "dtype": case.dtype, "memory_format": _LAYOUTS[case.layout]}
    state_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return Problem(
        case,
        x.to(**layout).requires_grad_(),
        grad_output.to(**layout),
        {name: value.to(case.device, state_dtype) for name, value in state.items()},
    )


class ReferenceNorm(nn.Module):
    """The formula as a user without this package would run it: plain PyTorch operations under autograd."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            if name.startswith("running"):
                self.register_buffer(name, value.clone())
            else:
                self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, H, W) and update the running statistics."""
        running = self.running_prior, self.running_mean, self.running_var
        y, _, _, batch = reference.forward(
            x, None, None, *running, self.weight, self.bias, training=True, relu=False, eps=EPS
        )
        with torch.no_grad():
            reference.update_running(*running, batch, points=x.numel() // x.shape[1], momentum=MOMENTUM)
        return y


@dataclass(frozen=True)
class LayerWorkload:
    """A layer in training mode on a problem's tensors."""

    layer: nn.Module
    problem: Problem

    def forward(self) -> Tensor:
        """y (N, C, H, W)."""
        return self.layer(self.problem.x)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x (N, C, H, W), weight and bias, (M, C) or (C,)."""
        inputs = (self.problem.x, self.layer.weight, self.layer.bias)
        return torch.autograd.grad(output, inputs, self.problem.grad_output)


def set_up(provider: str, problem: Problem) -> LayerWorkload:
    """The provider's layer on a problem, in the problem's state."""
    channels, components = problem.case.shape[1], problem.case.components
    state, factory = problem.state, {"device": problem.case.device, "dtype": problem.state["weight"].dtype}
    if provider == OURS:
        layer = CompoundBatchNorm2d(channels, components, eps=EPS, momentum=MOMENTUM, **factory)
        layer.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    elif provider in (BATCHNORM, BATCHNORM_COMPILED):
        if components != 1:
            raise ValueError(f"expected one component for {provider}, got {components}")
        layer = nn.BatchNorm2d(channels, eps=EPS, momentum=MOMENTUM, **factory)
        layer.load_state_dict(
            {name: value[0] for name, value in state.items() if name != "running_prior"}, strict=False
        )
    elif provider in (REFERENCE, REFERENCE_COMPILED):
        layer = ReferenceNorm(state)
    else:
        raise ValueError(f"unknown provider {provider!r}")
    if provider in (BATCHNORM_COMPILED, REFERENCE_COMPILED):
        layer = torch.compile(layer, dynamic=False)
    return LayerWorkload(layer, problem)


def expected_results(problem: Problem, block_elements: int = 2**20) -> tuple[Tensor, ...]:
    """y, then the gradients of x, weight and bias, by the reference in float64.

    Channels do not depend on each other, so they are computed in blocks: the reference holds dozens of
    tensors as large as M inputs.
    """
    channels = problem.case.shape[1]
    width = max(1, block_elements * channels // problem.x.numel())
    blocks = []
    for start in range(0, channels, width):
        part = slice(start, start + width)
        x = problem.x.detach()[:, part].double().requires_grad_()
        state = {name: value[:, part].double() for name, value in problem.state.items()}
        weight, bias = state.pop("weight").requires_grad_(), state.pop("bias").requires_grad_()
        y = reference.forward(x, None, None, *state.values(), weight, bias, training=True, relu=False, eps=EPS)[0]
        gradients = torch.autograd.grad(y, (x, weight, bias), problem.grad_output[:, part].double())
        blocks.append((y.detach(), *gradients))
    return tuple(torch.cat(pieces, 1) for pieces in zip(*blocks, strict=True))


def check(name: str, workload: LayerWorkload, expected: tuple[Tensor, ...]) -> None:
    """Compare one step's output and gradients with `expected_results`.

    Raises:
        WrongResultError: an error above `ERROR_LIMIT`, or not a number.
    """
    case = workload.problem.case
    output = workload.forward()
    results = (output.detach(), *workload.backward(output))
    for what, actual, right in zip(("y", "grad x", "grad weight", "grad bias"), results, expected, strict=True):
        error = ((actual.double().reshape(right.shape) - right).norm() / right.norm()).item()
        limit = ERROR_LIMIT[case.dtype]
        if not error <= limit:
            where = ", ".join(f"{key} {value}" for key, value in case.labels.items())
            raise WrongResultError(
                f"{name}, {where}: {what} differs from the float64 reference by {error:.3g} of its norm, "
                f"expected at most {limit:g}"
            )
