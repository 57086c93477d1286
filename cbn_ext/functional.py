"""Compound and split batch normalization as functions: arguments checked, backend chosen, gradients attached.

One pair of `torch.autograd.Function`s serves every backend and mode. The backward pass is a Function of its own, so
that double backward differentiates the composite formula rather than, silently, nothing.
"""

import inspect
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from . import ops, reference
from ._extension import backend, load_error, native_available, warn_of_fallback
from .options import Mode, Options

#: Share of the start mixture's unit variance that lies between its components (the rest lies within each).
_SPREAD = 0.5
_RESPONSIBILITIES = ("channel", "joint")
ACTIVATIONS = (None, "relu")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def start_mixture(
    num_components: int, num_features: int, responsibility: str, order: Tensor | None = None, **factory
) -> tuple[Tensor, Tensor, Tensor]:
    """Prior (M, C), or (M,) in joint mode, mean and variance (M, C) of a mixture with mean 0 and variance 1.

    The components' means are equally spaced; `order` (M, C) says which component of a channel takes which of them. By
    default component m of channel c takes the one numbered (m + c) mod M, so that no component is lowest everywhere.
    """
    shape = (num_components, num_features)
    if order is None:
        order = torch.arange(num_components)[:, None] + torch.arange(num_features)
        order = (order % num_components).to(factory.get("device"))
    spread = _SPREAD if num_components > 1 else 0.0
    # linspace(-1, 1, M) has variance (M + 1) / (3 (M - 1)).
    scale = (3 * spread * (num_components - 1) / (num_components + 1)) ** 0.5
    points = (
        torch.linspace(-scale, scale, num_components, **factory) if num_components > 1 else torch.zeros(1, **factory)
    )
    return (
        torch.full(shape if responsibility == "channel" else shape[:1], 1 / num_components, **factory),
        points[order],
        torch.full(shape, 1 - spread, **factory),
    )


def compound_batch_norm(
    input: Tensor,
    running_prior: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool = False,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    responsibility: str = "channel",
    detach_responsibility: bool = False,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalise by a mixture of M Gaussians, one step of running EM (paper section 3.2, eqs 7-16).

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, float64, float16 or bfloat16.
        running_prior: π (M, C), or (M,) in joint mode.
        running_mean, running_var: μ and σ² (M, C). The running statistics give the responsibilities; in training they
            then move, in place, towards the batch's. In training all three may be None: the start mixture then serves.
        weight, bias: γ and β (M, C), or None for 1 and 0. Of the input's dtype, or float32 for 16-bit inputs.
        training: normalise with the batch's statistics and update the running ones.
        momentum: λ, the weight of the batch in the running statistics, a number or a one-element tensor; None leaves
            them as they are.
        eps: ε, added to every variance.
        responsibility: "channel", a mixture for each channel, or "joint", one over the channels of a point.
        detach_responsibility: treat the responsibilities as constants in the gradient, the classical EM reading.
        residual: added to the result before the activation, of the input's shape and dtype; None for 0.
        activation: "relu", or None for none. Both are part of the same passes over the input: nothing but the input,
            and with residual and activation one bit per element, is kept for backward.

    Returns:
        act(Σ_m p_m (γ_m (x − μ_m) / sqrt(σ²_m + ε) + β_m) + residual), of the input's shape, dtype and memory format.

    Raises:
        ValueError: one value per channel in training, an unknown responsibility or activation.
        RuntimeError: shapes, dtypes or devices that do not fit together.
        NotImplementedError: a dtype that is not supported, or joint mode with the backend "native".
    """
    if responsibility not in _RESPONSIBILITIES:
        raise ValueError(f"expected responsibility in {_RESPONSIBILITIES}, got {responsibility!r}")
    running = (running_prior, running_mean, running_var)
    if any(r is None for r in running):
        if not training or any(r is not None for r in running):
            raise RuntimeError(
                "expected running_prior, running_mean and running_var, or, in training, None for all three; got "
                + ", ".join("None" if r is None else f"shape {tuple(r.shape)}" for r in running)
            )
        affine = weight if weight is not None else bias
        num_components = 1 if affine is None else affine.shape[0]
        dtype = reference.compute_dtype(input.dtype)
        running = start_mixture(num_components, input.shape[1], responsibility, device=input.device, dtype=dtype)
        momentum = None
    mode = Mode.JOINT if responsibility == "joint" else Mode.CHANNEL
    options = Options(mode, training, _relu_of(activation), detach_responsibility, eps)
    return _normalize(input, residual, None, *running, weight, bias, options, momentum)


def split_batch_norm(
    input: Tensor,
    groups: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalise each group of images by itself, with the group's own affine pair (paper section 3.3, eqs 17-18).

    A training-time operation: the batch's statistics are used and the running ones updated.

    Args:
        input: (N, C, ...) as for `compound_batch_norm`.
        groups: component of each image (N,), integers from 0 to M − 1.
        running_mean, running_var: (M, C), updated in place for the groups that are present.
        weight, bias: γ and β (M, C), or None for 1 and 0.
        momentum: λ, the weight of the batch in the running statistics; None leaves them as they are.
        eps: ε, added to every variance.
        residual, activation: as for `compound_batch_norm`.

    Returns:
        Of the input's shape, dtype and memory format.

    Raises:
        ValueError: one value per channel in the whole batch, or an unknown activation.
        RuntimeError: shapes, dtypes, devices or groups that do not fit together.
        NotImplementedError: a dtype that is not supported.
    """
    if running_mean is None or running_var is None:
        raise RuntimeError("expected running_mean and running_var, which tell the number of components, got None")
    if groups.dim() != 1 or groups.shape[0] != input.shape[0]:
        raise RuntimeError(
            f"expected one group for each of the {input.shape[0]} images, got groups of shape {tuple(groups.shape)}"
        )
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise RuntimeError(f"expected integer groups, got {groups.dtype}")
    if groups.device != input.device:
        raise RuntimeError(f"expected groups on {input.device}, the input's device, got {groups.device}")
    if groups.dtype != torch.long:
        groups = groups.long()
    options = Options(Mode.GROUPS, True, _relu_of(activation), False, eps)
    return _normalize(input, residual, groups, None, running_mean, running_var, weight, bias, options, momentum)


def _normalize(
    input: Tensor,
    residual: Tensor | None,
    groups: Tensor | None,
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
    momentum: float | Tensor | None,
) -> Tensor:
    _check(input, residual, prior, mean, var, weight, bias, options)
    dtype = reference.compute_dtype(input.dtype)
    backend = _choose_backend(input.device.type, options.mode)
    per_channel = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (prior, mean, var, weight, bias))
    y, _, _, batch = _Normalize.apply(input, residual, groups, *per_channel, options, backend)
    if options.training and momentum is not None:
        with torch.no_grad():
            # The native update takes a number, and statistics of the dtype they were used in.
            update = (reference if isinstance(momentum, Tensor) or mean.dtype != dtype else backend).update_running
            points = input.numel() // input.shape[1] if input.shape[1] else 0
            update(prior, mean, var, batch, points, momentum)
    return y


def _choose_backend(device: str, mode: Mode) -> ModuleType:
    """What computes this call, `ops` or `reference`: both have the same functions."""
    choice = backend()
    if choice == "native":
        if mode is Mode.JOINT:
            raise NotImplementedError('the backend "native" serves channel and split mode, got joint')
        if not native_available(device):
            raise RuntimeError(f'the backend "native" is not available: {load_error(device)}')
    if choice == "reference" or mode is Mode.JOINT:
        return reference
    if not native_available(device):
        warn_of_fallback(device)
        return reference
    return ops


def _relu_of(activation: str | None) -> bool:
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected activation in {ACTIVATIONS}, got {activation!r}")
    return activation == "relu"


def _check(
    input: Tensor,
    residual: Tensor | None,
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> None:
    """Raise where the arguments do not fit together; the messages name what was expected and what came."""
    if input.dtype not in _DTYPES:
        raise NotImplementedError(f"expected an input of {_DTYPES}, got {input.dtype}")
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")
    channels, shape = input.shape[1], mean.shape
    if len(shape) != 2 or shape[1] != channels:
        raise RuntimeError(
            f"expected running_mean of shape (M, {channels}) for an input of {channels} channels, got {tuple(shape)}"
        )
    components = shape[0]
    if not 1 <= components <= 16:
        raise RuntimeError(f"expected 1 to 16 components, got {components}")
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    allowed = (input.dtype, torch.float32) if narrow else (input.dtype,)
    for name, tensor, expected in (
        ("running_prior", prior, shape[:1] if options.mode is Mode.JOINT else shape),
        ("running_mean", mean, shape),
        ("running_var", var, shape),
        ("weight", weight, shape),
        ("bias", bias, shape),
    ):
        if tensor is None:
            continue
        if tensor.shape != expected:
            raise RuntimeError(f"expected {name} of shape {tuple(expected)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in allowed:
            raise RuntimeError(
                f"expected {name} of {' or '.join(map(str, allowed))} for an input of {input.dtype}, got {tensor.dtype}"
            )
        if tensor.device != input.device:
            raise RuntimeError(f"expected {name} on {input.device}, the input's device, got {tensor.device}")
    if residual is not None:
        # No broadcasting: its gradient is the output's, masked.
        if residual.shape != input.shape:
            raise RuntimeError(
                f"expected residual of shape {tuple(input.shape)}, the input's, got {tuple(residual.shape)}"
            )
        if residual.dtype != input.dtype:
            raise RuntimeError(f"expected residual of {input.dtype}, the input's dtype, got {residual.dtype}")
        if residual.device != input.device:
            raise RuntimeError(f"expected residual on {input.device}, the input's device, got {residual.device}")
    if options.training and input.shape.numel() // max(channels, 1) == 1 and channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")


def _inputs(function: type[torch.autograd.Function]) -> tuple[str, ...]:
    """Names of a Function's inputs. Keeps its forward's signature, which torch would else read anew in each call."""
    signature = inspect.signature(function.forward)
    function.forward.__signature__ = signature
    return tuple(signature.parameters)


def _gradients(ctx, inputs: tuple[str, ...], **gradients: Tensor) -> tuple[Tensor | None, ...]:
    """What a Function's backward returns: for each of its inputs the gradient given, where one is asked for."""
    asked = zip(inputs, ctx.needs_input_grad, strict=True)
    return tuple(gradients.get(name) if needed else None for name, needed in asked)


class _Normalize(torch.autograd.Function):
    """Forward of every mode and backend. Saves x, the ReLU's mask and per-channel tensors; p is recomputed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, residual, groups, prior, mean, var, weight, bias, options, backend):
        return backend.forward(x, residual, groups, prior, mean, var, weight, bias, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, groups, _, _, _, weight, bias, ctx.options, ctx.backend = inputs
        _, mask, running, batch = output
        ctx.mark_non_differentiable(mask, running, batch)
        ctx.set_materialize_grads(False)
        mask = mask if ctx.options.relu and residual is not None else None
        ctx.save_for_backward(x, mask, groups, running, batch, weight, bias)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return _gradients(ctx, _NORMALIZE_INPUTS)
        x, mask, *rest = ctx.saved_tensors
        grad_x, grad_residual, grad_weight, grad_bias = _NormalizeBackward.apply(
            grad, x, mask, *rest, ctx.options, ctx.backend
        )
        grad_residual = grad if mask is None else grad_residual
        return _gradients(ctx, _NORMALIZE_INPUTS, x=grad_x, residual=grad_residual, weight=grad_weight, bias=grad_bias)


class _NormalizeBackward(torch.autograd.Function):
    """Backward of `_Normalize`, differentiable in turn through the composite formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, x, mask, groups, running, batch, weight, bias, options, backend):
        return backend.backward(grad, x, mask, groups, running, batch, weight, bias, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad, *saved = ctx.saved_tensors
        x, mask, groups, running, _, weight, bias = saved
        prior, mean, var = reference.unstacked(running, ctx.options.mode)
        # None (no affine) cannot be an argument of vjp; the gradients' formula is the same with 1 and 0.
        affine = [torch.ones_like(mean) if weight is None else weight, torch.zeros_like(mean) if bias is None else bias]
        gate, options = None, ctx.options
        if mask is not None:
            # Where gradients pass is a constant, and only the backend can read it.
            passed = _NormalizeBackward.apply(torch.ones_like(grad), *saved, ctx.options, ctx.backend)[1]
            gate, options = passed.detach() != 0, replace(ctx.options, relu=False)

        def output(x, weight, bias):
            return reference.forward(x, None, groups, prior, mean, var, weight, bias, options)[0]

        def gradients(grad, x, weight, bias):
            passed = grad if gate is None else torch.where(gate, grad, 0.0)
            grad_x, grad_weight, grad_bias = torch.func.vjp(output, x, weight, bias)[1](passed)
            return grad_x, passed if gate is not None else grad.new_empty(0), grad_weight, grad_bias

        grad_grad, grad_x, grad_weight, grad_bias = torch.func.vjp(gradients, grad, x, *affine)[1](grad_grads)
        return _gradients(ctx, _BACKWARD_INPUTS, grad=grad_grad, x=grad_x, weight=grad_weight, bias=grad_bias)


# Globals, because torch.compile (2.11) does not read attributes of a Function.
_NORMALIZE_INPUTS = _inputs(_Normalize)
_BACKWARD_INPUTS = _inputs(_NormalizeBackward)
