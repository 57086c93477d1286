"""The providers of a normalization, set up by one function on one problem, and the check of their results."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbn_ext
from cbn_ext import CompoundBatchNorm2d, CompoundBatchNormAct2d, reference

#: What is computed: cbn(x), relu(cbn(x)), relu(cbn(x) + residual).
NORM, RELU, ADD_RELU = OPERATIONS = ("norm", "norm + ReLU", "norm + add + ReLU")

OURS, OURS_RELU, OURS_ADD_RELU = "cbn_ext", "cbn_ext + ReLU", "cbn_ext + add + ReLU"
BATCHNORM, BATCHNORM_COMPILED = "BatchNorm2d", "BatchNorm2d compiled"
BATCHNORM_RELU, BATCHNORM_RELU_COMPILED = "BatchNorm2d + ReLU", "BatchNorm2d + ReLU compiled"
BATCHNORM_ADD_RELU, BATCHNORM_ADD_RELU_COMPILED = "BatchNorm2d + add + ReLU", "BatchNorm2d + add + ReLU compiled"
REFERENCE, REFERENCE_COMPILED = "reference", "reference compiled"


class Provider(NamedTuple):
    """How a result is made. settings: CBN_CUDA_NAME to value, for the CUDA operators, which else choose themselves."""

    layer: str
    operation: str = NORM
    compiled: bool = False
    settings: Mapping[str, int] = {}


#: Settings that are compared with the operators' own choice: of the streaming path, then of the resident one.
_SETTINGS = (
    *({"CLUSTER": 0, "BLOCKS": blocks, "AHEAD": ahead} for blocks in (4, 8, 16) for ahead in (3, 7)),
    *({"CLUSTER": cluster, "THREADS": threads} for cluster in (1, 8) for threads in (256, 512)),
)


PROVIDERS = {
    OURS: Provider("cbn_ext"),
    OURS_RELU: Provider("cbn_ext", RELU),
    OURS_ADD_RELU: Provider("cbn_ext", ADD_RELU),
    BATCHNORM: Provider("BatchNorm2d"),
    BATCHNORM_RELU: Provider("BatchNorm2d", RELU),
    BATCHNORM_ADD_RELU: Provider("BatchNorm2d", ADD_RELU),
    BATCHNORM_COMPILED: Provider("BatchNorm2d", compiled=True),
    BATCHNORM_RELU_COMPILED: Provider("BatchNorm2d", RELU, compiled=True),
    BATCHNORM_ADD_RELU_COMPILED: Provider("BatchNorm2d", ADD_RELU, compiled=True),
    REFERENCE: Provider("reference"),
    REFERENCE_COMPILED: Provider("reference", compiled=True),
    **{
        f"{OURS} " + " ".join(f"{name.lower()}={value}" for name, value in settings.items()): Provider(
            "cbn_ext", settings=settings
        )
        for settings in _SETTINGS
    },
}

EPS = 1e-5
#: Small enough that the running statistics, and with them the responsibilities, stay what they are for
#: thousands of steps; not 0, of which a compiler could make use.
MOMENTUM = 1e-6

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
            "shape": shape_label(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
            "M": self.components,
            "data": self.data,
        }


@dataclass(frozen=True)
class Problem:
    """The tensors of a case: x, grad_output and residual (N, C, H, W); the layer's state, name to (M, C)."""

    case: Case
    x: Tensor
    grad_output: Tensor
    residual: Tensor
    state: dict[str, Tensor] = field(repr=False)


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
    layout = {"dtype": case.dtype, "memory_format": MEMORY_FORMATS[case.layout]}
    state_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return Problem(
        case,
        x.to(**layout).requires_grad_(),
        grad_output.to(**layout),
        residual.to(**layout).requires_grad_(),
        {name: value.to(state_dtype) for name, value in state.items()},
    )


class BatchNormAct(nn.BatchNorm2d):
    """nn.BatchNorm2d with what follows it in a ResNet, in place as in torchvision's."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(bn(x) + residual), all (N, C, H, W)."""
        y = super().forward(x)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True)


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
        """Normalise x (N, C, H, W) and, in training, update the running statistics."""
        running = self.running_prior, self.running_mean, self.running_var
        options = reference.Options(reference.Mode.CHANNEL, self.training, False, False, EPS)
        y, _, _, batch = reference.forward(x, None, None, *running, self.weight, self.bias, options)
        if self.training:
            with torch.no_grad():
                reference.update_running(*running, batch, points=x.numel() // x.shape[1], momentum=MOMENTUM)
        return y


@dataclass(frozen=True)
class LayerWorkload:
    """A provider's layer, in training mode, on a problem's tensors."""

    provider: Provider
    layer: nn.Module
    problem: Problem

    def forward(self) -> Tensor:
        """y (N, C, H, W)."""
        inputs = (self.problem.x, self.problem.residual)
        return self.layer(*(inputs if self.provider.operation == ADD_RELU else inputs[:1]))

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x (N, C, H, W), weight and bias, (M, C) or (C,), and of what was added (N, C, H, W)."""
        inputs = [self.problem.x, self.layer.weight, self.layer.bias]
        if self.provider.operation == ADD_RELU:
            inputs.append(self.problem.residual)
        return torch.autograd.grad(output, inputs, self.problem.grad_output)

    def evaluate(self) -> Tensor:
        """y (N, C, H, W) in evaluation mode, without autograd."""
        self.layer.eval()
        try:
            with torch.no_grad():
                return self.forward()
        finally:
            self.layer.train()


@contextmanager
def cuda_settings(settings: Mapping[str, int]) -> Iterator[None]:
    """Have the CUDA operators plan their launches by CBN_CUDA_NAME = value meanwhile, and then as before."""
    if not settings:
        yield
        return
    variables = {f"CBN_CUDA_{name}": str(value) for name, value in settings.items()}
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        cbn_ext.ops.read_cuda_environment()
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)
        cbn_ext.ops.read_cuda_environment()


def set_up(name: str, problem: Problem) -> LayerWorkload:
    """A provider's layer on a problem, in the problem's state."""
    if name not in PROVIDERS:
        raise ValueError(f"unknown provider {name!r}")
    provider = PROVIDERS[name]
    channels, components = problem.case.shape[1], problem.case.components
    state, factory = problem.state, {"device": problem.case.device, "dtype": problem.state["weight"].dtype}
    options = {"eps": EPS, "momentum": MOMENTUM, **factory}
    if provider.layer == "cbn_ext":
        layer_class = CompoundBatchNorm2d if provider.operation == NORM else CompoundBatchNormAct2d
        layer = layer_class(channels, components, **options)
        layer.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    elif provider.layer == "BatchNorm2d":
        if components != 1:
            raise ValueError(f"expected one component for {name}, got {components}")
        layer = (nn.BatchNorm2d if provider.operation == NORM else BatchNormAct)(channels, **options)
        layer.load_state_dict({key: value[0] for key, value in state.items() if key != "running_prior"}, strict=False)
    else:
        layer = ReferenceNorm(state)
    return LayerWorkload(provider, torch.compile(layer, dynamic=False) if provider.compiled else layer, problem)


def part_of(problem: Problem, channels: slice | Tensor) -> Problem:
    """The problem of some channels: none depends on another."""
    return Problem(
        problem.case,
        problem.x.detach()[:, channels],
        problem.grad_output[:, channels],
        problem.residual.detach()[:, channels],
        {name: value[:, channels] for name, value in problem.state.items()},
    )


def expected_results(
    problem: Problem, operation: str = NORM, output: Tensor | None = None, block_elements: int = 2**20
) -> tuple[Tensor, ...]:
    """What `LayerWorkload`'s step is to give, y and then the gradients, by the reference in float64.

    Channels are computed in blocks: the reference holds dozens of tensors as large as M inputs. With a ReLU the
    gradient passes where `output`, the provider's own y, is positive: near zero, rounding decides.
    """
    channels = problem.x.shape[1]
    width = max(1, block_elements * channels // problem.x.numel())
    blocks = []
    for start in range(0, channels, width):
        part = part_of(problem, slice(start, start + width))
        x, grad = part.x.double().requires_grad_(), part.grad_output.double()
        state = {name: value.double() for name, value in part.state.items()}
        weight, bias = state.pop("weight").requires_grad_(), state.pop("bias").requires_grad_()
        normalised = _reference(x, *state.values(), weight, bias, training=True)
        y = _activate(normalised.detach(), part, operation)
        if operation != NORM:
            grad = torch.where(output[:, start : start + width] > 0, grad, 0)
        gradients = torch.autograd.grad(normalised, (x, weight, bias), grad)
        blocks.append((y, *gradients, *([grad] if operation == ADD_RELU else [])))
    return tuple(torch.cat(pieces, 1) for pieces in zip(*blocks, strict=True))


def expected_evaluation(problem: Problem, operation: str = NORM) -> Tensor:
    """What `LayerWorkload.evaluate` is to give, by the reference in float64."""
    state = (value.double() for value in problem.state.values())
    return _activate(_reference(problem.x.detach().double(), *state, training=False), problem, operation)


def _reference(x: Tensor, *state: Tensor, training: bool) -> Tensor:
    options = reference.Options(reference.Mode.CHANNEL, training, False, False, EPS)
    return reference.forward(x, None, None, *state, options)[0]


def _activate(y: Tensor, problem: Problem, operation: str) -> Tensor:
    if operation == ADD_RELU:
        y = y + problem.residual.detach()
    return y if operation == NORM else y.relu()


def results(workload: LayerWorkload) -> tuple[Tensor, ...]:
    """One step's y, like x, and gradients: of x, of weight and bias (M, C), of what was added, like x."""
    output = workload.forward()
    gradients = workload.backward(output)
    return output.detach(), *(g if g.dim() > 2 else g.reshape(workload.problem.case.components, -1) for g in gradients)


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
