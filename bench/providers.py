"""The providers of a normalization, set up by one function on one problem, and the check of their results."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cbn_ext
from bench.cases import (
    ADD_RELU,
    EPS,
    NORM,
    RELU,
    Case,
    Problem,
    check,
    expected_evaluation,
    expected_results,
    joint_prior,
    run_reference,
)
from cbn_ext import Mode

#: Layers; the name of a provider is that of its layer, followed by its operation and by one of the words below.
OURS, BATCHNORM, REFERENCE = "cbn_ext", "BatchNorm2d", "reference"
SPLIT, JOINT, COMPILED = " split", " joint", " compiled"

_MODES = {Mode.CHANNEL: "", Mode.GROUPS: SPLIT, Mode.JOINT: JOINT}

#: Small enough that the running statistics, and with them the responsibilities, stay what they are for thousands of
#: steps; not 0, of which a compiler could make use.
MOMENTUM = 1e-6


class Provider(NamedTuple):
    """How a result is made.

    settings: CBN_CUDA_NAME to value, for the CUDA operators, which else choose themselves.
    """

    layer: str
    operation: str = NORM
    mode: Mode = Mode.CHANNEL
    compiled: bool = False
    settings: Mapping[str, int] = {}

    @property
    def name(self) -> str:
        """As it stands in tables and files."""
        settings = "".join(f" {key.lower()}={value}" for key, value in self.settings.items())
        return self.layer + self.operation + _MODES[self.mode] + COMPILED * self.compiled + settings

    @property
    def peer(self) -> str:
        """The provider in units of whose time this one's is given."""
        return BATCHNORM + self.operation


#: Settings that are compared with the operators' own choice: of the streaming path, then of the resident one.
_SETTINGS = (
    *({"CLUSTER": 0, "BLOCKS": blocks} for blocks in (4, 8, 16)),
    *({"CLUSTER": cluster, "THREADS": threads} for cluster in (1, 8) for threads in (256, 512)),
)

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(OURS),
        Provider(OURS, RELU),
        Provider(OURS, ADD_RELU),
        Provider(OURS, mode=Mode.GROUPS),
        Provider(OURS, mode=Mode.JOINT),
        Provider(BATCHNORM),
        Provider(BATCHNORM, RELU),
        Provider(BATCHNORM, ADD_RELU),
        Provider(BATCHNORM, compiled=True),
        Provider(BATCHNORM, RELU, compiled=True),
        Provider(BATCHNORM, ADD_RELU, compiled=True),
        Provider(REFERENCE),
        Provider(REFERENCE, compiled=True),
        *(Provider(OURS, settings=settings) for settings in _SETTINGS),
    )
}


@dataclass(frozen=True)
class Comparison:
    """A case, whose number of components each member replaces, and its members: (provider, components).

    phase: the part of a benchmark to which it belongs, which has each case once.
    """

    case: Case
    members: tuple[tuple[str, int], ...]
    phase: str = ""

    def __post_init__(self) -> None:
        if (BATCHNORM, 1) not in self.members:
            raise ValueError(f"expected {BATCHNORM} among the members, which all are compared with; got {self.members}")


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
        y, batch = run_reference(x, *running, self.weight, self.bias, training=self.training)
        if self.training:
            with torch.no_grad():
                points = x.numel() // x.shape[1]
                cbn_ext.reference.update_running(*running, batch=batch, points=points, momentum=MOMENTUM)
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
        with cbn_ext.split_path(self.problem.groups) if self.provider.mode is Mode.GROUPS else nullcontext():
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

    def results(self) -> tuple[Tensor, ...]:
        """One step's y, like x, and gradients: of x, of weight and bias (M, C), of what was added, like x."""
        output = self.forward()
        components = self.problem.case.components
        gradients = (g if g.dim() > 2 else g.reshape(components, -1) for g in self.backward(output))
        return output.detach(), *gradients

    def tensors(self) -> tuple[Tensor, ...]:
        """One step's results that are like x."""
        return tuple(result for result in self.results() if result.dim() == 4)

    @property
    def in_out_bytes(self) -> int:
        """Bytes of x, y, the residual where there is one, and the gradients of all."""
        return (6 if self.provider.operation == ADD_RELU else 4) * self.problem.case.tensor_bytes


class Checker:
    """Compares steps of providers on one case with the reference; what serves several providers is kept.

    elements: of those channels, about so many at most, that are compared, the first and the last among them.
    """

    def __init__(self, elements: int = sys.maxsize) -> None:
        self.elements = elements
        self._kept: dict[tuple[int, Mode], tuple[Tensor, ...]] = {}

    def __call__(self, workload: LayerWorkload, evaluation: bool = False) -> None:
        """Check y and gradients and, where asked for, the output in evaluation; raises WrongResultError."""
        problem, provider = workload.problem, workload.provider
        case, count = problem.case, problem.case.shape[1]
        # In joint mode each channel depends on all others.
        width = count if provider.mode is Mode.JOINT else max(1, self.elements * count // problem.x.numel())
        channels = torch.linspace(0, count - 1, min(width, count), device=problem.x.device).long()
        part = problem.part(channels)
        if evaluation:  # before a step moves the running statistics
            expected = [expected_evaluation(part, provider.operation, provider.mode)]
            check(f"{provider.name} in evaluation", case, [workload.evaluate()[:, channels]], expected)
        actual = [result[:, channels] for result in workload.results()]
        if provider.operation == NORM:
            key = case.components, provider.mode
            if key not in self._kept:
                self._kept[key] = expected_results(part, mode=provider.mode)
            expected = self._kept[key]
        else:
            expected = expected_results(part, provider.operation, provider.mode, actual[0])
        check(provider.name, case, actual, expected, provider.operation)


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
    plain, state, components = provider.operation == NORM, problem.state, problem.case.components
    factory = {"device": problem.case.device, "dtype": state["weight"].dtype}
    options = {"num_features": problem.case.shape[1], "eps": EPS, "momentum": MOMENTUM, **factory}
    if provider.layer == OURS:
        layer_class = cbn_ext.CompoundBatchNorm2d if plain else cbn_ext.CompoundBatchNormAct2d
        if provider.mode is Mode.JOINT:
            options["responsibility"] = "joint"
            state = state | {"running_prior": joint_prior(state["running_prior"])}
        layer = layer_class(num_components=components, **options)
        layer.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    elif provider.layer == BATCHNORM:
        if components != 1:
            raise ValueError(f"expected one component for {name}, got {components}")
        layer = (nn.BatchNorm2d if plain else BatchNormAct)(**options)
        layer.load_state_dict({key: value[0] for key, value in state.items() if key != "running_prior"}, strict=False)
    else:
        layer = ReferenceNorm(state)
    return LayerWorkload(provider, torch.compile(layer, dynamic=False) if provider.compiled else layer, problem)
