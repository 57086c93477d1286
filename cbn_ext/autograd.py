"""The gradients: one pair of `torch.autograd.Function`s serves every backend and mode.

The backward pass is a Function of its own, so that double backward differentiates the composite formula rather than,
silently, nothing. A backend is a module, `ops` or `reference`.
"""

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from . import reference


def _inputs(function: type[torch.autograd.Function]) -> tuple[str, ...]:
    """Names of a Function's inputs."""
    return tuple(inspect.signature(function.forward).parameters)


def _gradients(ctx, inputs: tuple[str, ...], **gradients: Tensor) -> tuple[Tensor | None, ...]:
    """The result of a Function's backward: for each of its inputs the gradient named so, where one is asked for."""
    asked = zip(inputs, ctx.needs_input_grad, strict=True)
    return tuple(gradients.get(name) if needed else None for name, needed in asked)


class _Function(torch.autograd.Function):
    """A Function whose inputs are given by position, all of them."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *inputs):
        if torch._C._are_functorch_transforms_active():
            return super().apply(*inputs)
        # Past torch's own, which binds the inputs to forward's signature: that takes longer than a small map.
        return super(torch.autograd.Function, cls).apply(*inputs)


class Normalize(_Function):
    """Forward of every mode and backend. Saves x, the ReLU's mask, per-channel tensors and a joint posterior."""

    @staticmethod
    def forward(x, residual, groups, prior, mean, var, weight, bias, options, backend):
        return backend.forward(x, residual, groups, prior, mean, var, weight, bias, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, groups, _, _, _, weight, bias, ctx.options, ctx.backend = inputs
        _, mask, running, batch, posterior = output
        ctx.mark_non_differentiable(mask, running, batch, posterior)
        ctx.set_materialize_grads(False)
        mask = mask if ctx.options.relu and residual is not None else None
        ctx.save_for_backward(x, mask, groups, posterior, running, batch, weight, bias)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return _gradients(ctx, _NORMALIZE_INPUTS)
        saved = ctx.saved_tensors
        # Only a gradient that is differentiated in turn needs a graph.
        gradients = NormalizeBackward.apply if torch.is_grad_enabled() else NormalizeBackward.forward
        dx, dresidual, dweight, dbias = gradients(grad, *saved, ctx.options, ctx.backend)
        dresidual = grad if saved[1] is None else dresidual  # without a mask it is the output's gradient
        return _gradients(ctx, _NORMALIZE_INPUTS, x=dx, residual=dresidual, weight=dweight, bias=dbias)


class NormalizeBackward(_Function):
    """Backward of `Normalize`, differentiable in turn through the composite formula."""

    @staticmethod
    def forward(grad, x, mask, groups, posterior, running, batch, weight, bias, options, backend):
        return backend.backward(grad, x, mask, groups, posterior, running, batch, weight, bias, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad, *saved = ctx.saved_tensors
        x, mask, groups, _, running, _, weight, bias = saved
        prior, mean, var = reference.unstacked(running, ctx.options.mode)
        # None (no affine) cannot be an argument of vjp; the gradients' formula is the same with 1 and 0.
        affine = [torch.ones_like(mean) if weight is None else weight, torch.zeros_like(mean) if bias is None else bias]
        gate, options = None, ctx.options
        if mask is not None:
            # Where gradients pass is a constant, and only the backend can read it.
            passed = NormalizeBackward.apply(torch.ones_like(grad), *saved, ctx.options, ctx.backend)[1]
            gate, options = passed.detach() != 0, replace(ctx.options, relu=False)

        def output(x, weight, bias):
            return reference.forward(x, None, groups, prior, mean, var, weight, bias, options)[0]

        def gradients(grad, x, weight, bias):
            passed = grad if gate is None else torch.where(gate, grad, 0.0)
            dx, dweight, dbias = torch.func.vjp(output, x, weight, bias)[1](passed)
            return dx, passed if gate is not None else grad.new_empty(0), dweight, dbias

        dgrad, dx, dweight, dbias = torch.func.vjp(gradients, grad, x, *affine)[1](grad_grads)
        return _gradients(ctx, _BACKWARD_INPUTS, grad=dgrad, x=dx, weight=dweight, bias=dbias)


# Globals, because torch.compile (2.11) does not read attributes of a Function.
_NORMALIZE_INPUTS = _inputs(Normalize)
_BACKWARD_INPUTS = _inputs(NormalizeBackward)
