"""Compound batch normalization in plain PyTorch: the fallback where no native operator serves, and an oracle for those.

Written from the formulas, one component dimension in front: statistics are (M, C), broadcast against the input as
(M, 1, C, 1, ...); a responsibility p is (M, N, C, ...) in channel mode, (M, N, 1, ...) in joint mode and
(M, N, 1, 1, ...), zero or one, in split mode. Equations are those of the paper "Compound Batch Normalization for
Long-tailed Image Classification" (2022).
"""

import torch
from torch import Tensor

from .options import Mode, Options


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_absent(mass: Tensor) -> Tensor:
    """Which components have no mass in the batch, and so no statistics of it; NaN mass is not absent."""
    # Not a named constant: torch.compile with dynamic shapes (2.11) trips over a global float.
    return mass < 1e-30


def _along_channels(statistic: Tensor, x: Tensor) -> Tensor:
    """(M, C), or (M,) in joint mode, to (M, 1, C or 1, 1, ...), broadcastable against x (N, C, ...)."""
    channels = statistic.shape[1] if statistic.dim() == 2 else 1
    return statistic.reshape(statistic.shape[0], 1, channels, *[1] * (x.dim() - 2))


def _reduced_dims(x: Tensor) -> list[int]:
    """The dimensions of a (M, N, C, ...) tensor that statistics sum over: images and space."""
    return [1, *range(3, x.dim() + 1)]


def responsibilities(
    x: Tensor, groups: Tensor | None, prior: Tensor | None, mean: Tensor, var: Tensor, options: Options
) -> Tensor:
    """E-step (eqs 8-9) with the running statistics; by `groups` (N,), the indicator of each image's group (eq 17)."""
    if options.mode is Mode.GROUPS:
        components = torch.arange(mean.shape[0], device=x.device)
        indicator = groups == components[:, None]
        return indicator.to(x.dtype).reshape(*indicator.shape, *[1] * (x.dim() - 1))
    mean, var = _along_channels(mean, x), _along_channels(var, x) + options.eps
    log_density = -0.5 * torch.log(var) - (x - mean).square() / (2 * var)
    if options.mode is Mode.JOINT:
        log_density = log_density.sum(2, keepdim=True)
    # The floor lets a component that lost its mass come back. No named constant either.
    log_prior = _along_channels(prior.clamp_min(1e-6).log(), x)
    return torch.softmax(log_prior + log_density, dim=0)


def batch_statistics(x: Tensor, p: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """M-step (eqs 10-12): mass, mean and biased variance (3, M, C); without mass, the given `mean` and `var`."""
    if x.numel() == 0:
        return torch.stack([torch.zeros_like(mean), mean, var])
    dims = _reduced_dims(x)
    # Deviations from the channel's mean keep their digits where the mean is large against the deviation.
    shift = x.detach().mean([d for d in range(x.dim()) if d != 1], keepdim=True)
    shift = shift + (x.detach() - shift).mean([d for d in range(x.dim()) if d != 1], keepdim=True)
    deviation = x - shift
    points = x.numel() // x.shape[1]
    # In joint and split mode p does not vary over all of (N, C, ...): its sum is scaled to the points it stands for.
    mass = p.sum(dims) * (points / (p.numel() // (p.shape[0] * p.shape[2])))
    mass = mass.expand(mean.shape)
    absent = _is_absent(mass)
    inverse_mass = torch.where(absent, 1.0, mass).reciprocal()
    batch_mean = (p * deviation).sum(dims) * inverse_mass
    centered = deviation - _along_channels(batch_mean, x)
    batch_var = (p * centered.square()).sum(dims) * inverse_mass
    mean, var = torch.where(absent, mean, batch_mean + shift.flatten()), torch.where(absent, var, batch_var)
    return torch.stack([mass, mean, var])


def forward(
    x: Tensor,
    residual: Tensor | None,
    groups: Tensor | None,
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalise by every component and combine (eqs 7, 16), add and activate; differentiable by autograd.

    Args:
        x: input (N, C, ...).
        residual: what is added to the normalised x, like x, or None for 0.
        groups: component of each image (N,) in split mode, else None.
        prior, mean, var: running statistics, (M, C); the prior (M,) in joint mode, unused in split mode.
        weight, bias: one affine pair per component (M, C), or None for 1 and 0.
        options: what is computed.

    Returns:
        The output like x, and what `backward` needs: with a ReLU and a residual the ReLU's mask, uint8, one bit per
        element, else an empty tensor; copies of prior (0 for None), mean and variance, stacked to (3, M, C); in
        training the batch's mass, mean and biased variance, stacked likewise, else an empty tensor; an empty tensor
        again, where the native operators give the posterior of joint mode.

    Raises:
        RuntimeError: groups outside of 0 to M − 1.
    """
    # The statistics move between this pass and its backward pass, where a compiler may repeat what is computed here.
    copies = _opaque_stacked if options.training and torch.compiler.is_compiling() else _stacked
    running = copies(prior, mean, var)
    prior, mean, var = unstacked(running, options.mode)
    # On a device this would wait for it, and a compiled graph cannot branch on values.
    if groups is not None and x.numel() and groups.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = groups.min().item(), groups.max().item()
        if low < 0 or high >= mean.shape[0]:
            raise RuntimeError(f"expected groups from 0 to {mean.shape[0] - 1}, got values from {low} to {high}")
    wide = x.to(compute_dtype(x.dtype))
    p = responsibilities(wide, groups, prior, mean, var, options)
    if options.detach_responsibility:
        p = p.detach()
    batch = batch_statistics(wide, p, mean, var) if options.training else mean.new_empty(0)
    if options.training:
        _, mean, var = batch.unbind()
    r = torch.rsqrt(var + options.eps)
    scale = r if weight is None else weight * r
    branches = (wide - _along_channels(mean, x)) * _along_channels(scale, x)
    if bias is not None:
        branches = branches + _along_channels(bias, x)
    y = (p * branches).sum(0)
    if residual is not None:
        y = y + residual
    mask = _packed(~(y <= 0)) if options.relu and residual is not None else x.new_empty(0, dtype=torch.uint8)
    return _like(y.relu() if options.relu else y, x), mask, running, batch, mean.new_empty(0)


def _stacked(prior: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
    prior = torch.zeros_like(mean) if prior is None else prior.reshape(mean.shape[0], -1).expand(mean.shape)
    return torch.stack([prior, mean, var])


# The same as an operator: a compiled backward pass would rather stack again, after the statistics have moved.
_opaque_stacked = torch.library.custom_op("cbn_ext::stacked", _stacked, mutates_args=())


@_opaque_stacked.register_fake
def _(prior: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
    return mean.new_empty(3, *mean.shape)


def unstacked(running: Tensor, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    """Prior (M, C), or (M,) in joint mode, mean and variance (M, C) of `running` (3, M, C)."""
    prior, mean, var = running.unbind()
    return prior[:, :1].flatten() if mode is Mode.JOINT else prior, mean, var


def _packed(gate: Tensor) -> Tensor:
    """Eight booleans to a byte, in the order of indices, the last byte filled up with zeros."""
    bits = torch.nn.functional.pad(gate.flatten().to(torch.uint8), (0, -gate.numel() % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=gate.device)).sum(1, dtype=torch.uint8)


def _unpacked(mask: Tensor, like: Tensor) -> Tensor:
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten()[: like.numel()].reshape(like.shape).bool()


def backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    groups: Tensor | None,
    posterior: Tensor,
    running: Tensor,
    batch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `forward` for x, residual, weight and bias, in closed form, from x and what forward returned.

    `mask` is given where there were a ReLU and a residual, whose gradient then is the masked `grad`; else it is `grad`
    itself, and an empty tensor stands for it. `posterior` is not looked at: responsibilities are computed again.
    """
    dims = _reduced_dims(x)
    wide, g = x.to(compute_dtype(x.dtype)), grad.to(compute_dtype(x.dtype))
    prior, mean, var = unstacked(running, options.mode)
    p = responsibilities(wide, groups, prior, mean, var, options)
    mass, used_mean, used_var = batch.unbind() if options.training else (None, mean, var)
    r = torch.rsqrt(used_var + options.eps)
    scale = r if weight is None else weight * r

    deviation = wide - _along_channels(used_mean, x)
    branches = deviation * _along_channels(scale, x)
    if bias is not None:
        branches = branches + _along_channels(bias, x)
    grad_residual = x.new_empty(0)
    if mask is not None:
        g = torch.where(_unpacked(mask, x), g, 0.0)
        grad_residual = _like(g, x)
    elif options.relu:
        g = torch.where((p * branches).sum(0) <= 0, 0.0, g)
    weighted = p * g
    grad_bias = weighted.sum(dims)
    grad_weight = (weighted * deviation).sum(dims) * r

    # f: what one unit of p is worth to the loss, by the output and by the moments; slope: df/dx with g held.
    f = g * branches
    slope = g * _along_channels(scale, x)
    if options.training:
        absent = _is_absent(mass)
        inverse_mass = torch.where(absent, 0.0, torch.where(absent, 1.0, mass).reciprocal())
        by_mean = _along_channels(-scale * grad_bias * inverse_mass, x)
        by_var = _along_channels(-0.5 * r * scale * grad_weight * inverse_mass, x)
        f = f + by_mean * deviation + by_var * (deviation.square() - _along_channels(used_var, x))
        slope = slope + by_mean + 2 * by_var * deviation
    grad_x = (p * slope).sum(0)
    if options.mode is not Mode.GROUPS and not options.detach_responsibility:
        log_slope = (_along_channels(mean, x) - wide) / (_along_channels(var, x) + options.eps)
        if options.mode is Mode.JOINT:
            f = f.sum(2, keepdim=True)
        grad_x = grad_x + (p * (f - (p * f).sum(0)) * log_slope).sum(0)
    return _like(grad_x, x), grad_residual, grad_weight, grad_bias


def update_running(
    prior: Tensor | None, mean: Tensor, var: Tensor, batch: Tensor, points: int, momentum: float | Tensor
) -> None:
    """Temporal accumulation (eqs 13-15), in place; the variance that enters is the unbiased one.

    Args:
        prior, mean, var: running statistics, changed in place; `prior` None (split mode) is left alone.
        batch: the batch's mass, mean and biased variance, (3, M, C).
        points: points per channel P; with 0 nothing changes.
        momentum: weight of the batch, a number or a tensor of one element.
    """
    if points == 0:
        return
    mass, batch_mean, batch_var = batch.unbind()
    absent = _is_absent(mass)
    unbiased = batch_var * (mass / (mass - 1).clamp_min(1))
    targets = [(mean, batch_mean, absent), (var, unbiased, absent)]
    if prior is not None:
        share = (mass if prior.dim() == 2 else mass[:, 0]) / points
        targets.append((prior, share, torch.zeros_like(share, dtype=torch.bool)))
    for running, target, kept in targets:
        # Rounded once, to the dtype of the running statistics.
        moved = (1 - momentum) * running.to(target.dtype) + momentum * target
        running.copy_(torch.where(kept, running, moved))


def _like(result: Tensor, x: Tensor) -> Tensor:
    """`result` in x's dtype and layout: channels_last where x is, else contiguous."""
    # Each step only where it changes something: torch.compile (2.11) loses the gradient of an autograd.Function's
    # output that is the very tensor another step of its forward gave.
    if result.dtype != x.dtype:
        result = result.to(x.dtype)
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return result if result.movedim(1, -1).is_contiguous() else result.movedim(1, -1).contiguous().movedim(-1, 1)
    return result if result.is_contiguous() else result.contiguous()
