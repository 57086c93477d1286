"""Typed wrappers of the native operators `torch.ops.cbn_ext.*`, and their fake implementations for tracing.

Arguments and results are those of `cbn_ext.reference`.
"""

import torch
from torch import Tensor

from ._extension import load_error
from .options import Mode, Options


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
    """Output like x (N, C, ...), mask, running and batch statistics (3, M, C), posterior; see `reference.forward`."""
    native = (options.mode, options.training, options.relu, options.eps)
    return torch.ops.cbn_ext.forward(x, residual, groups, prior, mean, var, weight, bias, *native)


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
    """Gradients for x (N, C, ...), the residual (like x with a mask, else empty), weight and bias (M, C)."""
    native = (options.mode, options.training, options.relu, options.detach_responsibility, options.eps)
    return torch.ops.cbn_ext.backward(grad, x, mask, groups, posterior, running, batch, weight, bias, *native)


def update_running(
    prior: Tensor | None, mean: Tensor, var: Tensor, batch: Tensor, points: int, momentum: float
) -> None:
    """Move the running statistics (M, C) towards the batch's (3, M, C), in place, in one call."""
    torch.ops.cbn_ext.update_running(prior, mean, var, batch, points, momentum)


def read_cuda_environment() -> None:
    """Read the variables CBN_CUDA_* again, which the CUDA operators read by themselves only once.

    Raises:
        RuntimeError: one of them has a value that is not allowed; nothing changes then.
        NotImplementedError: there is no CUDA library.
    """
    torch.ops.cbn_ext.read_cuda_environment()


if load_error() is None:

    def _empty_like(x: Tensor) -> Tensor:
        dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
        return torch.empty_like(x, memory_format=torch.preserve_format if dense else torch.contiguous_format)

    def _empty_mask(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        bits = x.numel() if relu and residual is not None else 0
        return x.new_empty((bits + 31) // 32 * 4, dtype=torch.uint8)

    def _empty_posterior(x: Tensor, mean: Tensor, mode: int) -> Tensor:
        if mode != Mode.JOINT or mean.shape[0] == 1:
            return mean.new_empty(0)
        return mean.new_empty(mean.shape[0], x.shape[0], x[0, 0].numel() if x.numel() else 0)

    @torch.library.register_fake("cbn_ext::forward")
    def _(x, residual, groups, prior, mean, var, weight, bias, mode, training, relu, eps):
        batch = mean.new_empty((3, *mean.shape) if training else 0)
        mask, posterior = _empty_mask(x, residual, relu), _empty_posterior(x, mean, mode)
        return _empty_like(x), mask, mean.new_empty(3, *mean.shape), batch, posterior

    @torch.library.register_fake("cbn_ext::backward")
    def _(
        grad, x, mask, groups, posterior, running, batch, weight, bias, mode, training, relu, detach_responsibility, eps
    ):
        grad_x = _empty_like(x)
        grad_residual = x.new_empty(0) if mask is None else torch.empty_like(grad_x)
        return grad_x, grad_residual, running.new_empty(running.shape[1:]), running.new_empty(running.shape[1:])

    @torch.library.register_fake("cbn_ext::moments")
    def _(x, groups, prior, mean, var, mode, eps):
        return mean.new_empty(3, *mean.shape), _empty_posterior(x, mean, mode)

    @torch.library.register_fake("cbn_ext::normalise")
    def _(x, residual, groups, prior, mean, var, posterior, batch, weight, bias, mode, relu, eps):
        return _empty_like(x), _empty_mask(x, residual, relu), mean.new_empty(3, *mean.shape)

    @torch.library.register_fake("cbn_ext::gradient_sums")
    def _(grad, x, mask, groups, posterior, running, batch, weight, bias, mode, relu, eps):
        return running.new_empty(running.shape[1:]), running.new_empty(running.shape[1:])

    @torch.library.register_fake("cbn_ext::input_gradient")
    def _(
        grad,
        x,
        mask,
        groups,
        posterior,
        running,
        batch,
        weight,
        bias,
        dweight,
        dbias,
        mode,
        relu,
        detach_responsibility,
        eps,
    ):
        grad_x = _empty_like(x)
        return grad_x, x.new_empty(0) if mask is None else torch.empty_like(grad_x)

    @torch.library.register_fake("cbn_ext::merge_moments")
    def _(parts):
        return parts.new_empty(parts.shape[1:])

    @torch.library.register_fake("cbn_ext::update_running")
    def _(prior, mean, var, batch, points, momentum):
        return None
