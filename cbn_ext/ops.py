"""Typed wrappers of the native operators `torch.ops.cbn_ext.*`, and their fake implementations for tracing.

Arguments and results are those of `cbn_ext.reference`; the native operators serve channel and split mode.
"""

import torch
from torch import Tensor

from ._extension import native_available


def forward(
    x: Tensor,
    groups: Tensor | None,
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output like x (N, C, ...); the batch's mass, mean and variance (M, C), empty in evaluation."""
    return torch.ops.cbn_ext.forward(x, groups, prior, mean, var, weight, bias, training, eps)


def backward(
    grad: Tensor,
    x: Tensor,
    groups: Tensor | None,
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mass: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    eps: float,
    detach_responsibility: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x (N, C, ...), weight (M, C) and bias (M, C)."""
    return torch.ops.cbn_ext.backward(
        grad,
        x,
        groups,
        prior,
        mean,
        var,
        mass,
        batch_mean,
        batch_var,
        weight,
        bias,
        training,
        detach_responsibility,
        eps,
    )


def update_running(
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mass: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    points: int,
    momentum: float,
) -> None:
    """Move the running statistics (M, C) towards the batch's, in place, in one call."""
    torch.ops.cbn_ext.update_running(prior, mean, var, mass, batch_mean, batch_var, points, momentum)


if native_available():

    def _empty_like(x: Tensor) -> Tensor:
        dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
        return torch.empty_like(x, memory_format=torch.preserve_format if dense else torch.contiguous_format)

    @torch.library.register_fake("cbn_ext::forward")
    def _(x, groups, prior, mean, var, weight, bias, training, eps):
        statistics = [torch.empty_like(mean) if training else mean.new_empty(0) for _ in range(3)]
        return _empty_like(x), *statistics

    @torch.library.register_fake("cbn_ext::backward")
    def _(grad, x, groups, prior, mean, var, mass, batch_mean, batch_var, weight, bias, training, detach, eps):
        return _empty_like(x), torch.empty_like(mean), torch.empty_like(mean)

    @torch.library.register_fake("cbn_ext::update_running")
    def _(prior, mean, var, mass, batch_mean, batch_var, points, momentum):
        return None
