"""Compound and split batch normalization as functions: arguments checked, backend chosen, gradients attached.

One pair of `torch.autograd.Function`s serves every backend and mode. The backward pass is a Function of its own, so
that double backward differentiates the composite formula rather than, silently, nothing.
"""

import torch
from torch import Tensor

from . import ops, reference
from ._extension import backend, load_error, native_available

#: Share of the start mixture's unit variance that lies between its components (the rest lies within each).
_SPREAD = 0.5
_RESPONSIBILITIES = ("channel", "joint")
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

    Returns:
        Σ_m p_m (γ_m (x − μ_m) / sqrt(σ²_m + ε) + β_m), of the input's shape, dtype and memory format.

    Raises:
        ValueError: one value per channel in training, or an unknown responsibility.
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
    return _normalize(
        input, None, *running, weight, bias, training, momentum, eps, responsibility, detach_responsibility
    )


def split_batch_norm(
    input: Tensor,
    groups: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
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

    Returns:
        Of the input's shape, dtype and memory format.

    Raises:
        ValueError: one value per channel in the whole batch.
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
    groups = groups.long()
    return _normalize(
        input, groups, None, running_mean, running_var, weight, bias, True, momentum, eps, "channel", False
    )


def _normalize(
    input: Tensor,
    groups: Tensor | None,
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    responsibility: str,
    detach_responsibility: bool,
) -> Tensor:
    _check(input, prior, mean, var, weight, bias, training, responsibility)
    dtype = reference.compute_dtype(input.dtype)
    native = _use_native(input, responsibility)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    # Backward needs the running statistics of this moment, and they change below.
    copies = _opaque_copies if training and torch.compiler.is_compiling() else _copies
    mean_used, var_used, *prior_used = copies([mean, var] if prior is None else [mean, var, prior], dtype)
    prior_used = prior_used[0] if prior_used else None
    y, *batch = _Normalize.apply(
        input, weight, bias, groups, prior_used, mean_used, var_used,
        training, eps, responsibility, detach_responsibility, native,
    )  # fmt: skip
    if training and momentum is not None:
        with torch.no_grad():
            # The native update takes a number, and statistics of the dtype they were used in.
            native = native and not isinstance(momentum, Tensor) and mean.dtype == dtype
            update = ops.update_running if native else reference.update_running
            points = input.numel() // input.shape[1] if input.shape[1] else 0
            update(prior, mean, var, *batch, points, momentum)
    return y


def _copies(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype, copy=True) for t in tensors]


# The same as an operator: a compiled backward pass would rather copy again, after the tensors changed.
_opaque_copies = torch.library.custom_op("cbn_ext::copies", _copies, mutates_args=())


@_opaque_copies.register_fake
def _(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


def _use_native(input: Tensor, responsibility: str) -> bool:
    choice = backend()
    if choice == "reference":
        return False
    serves = responsibility == "channel" and input.device.type == "cpu"
    if choice == "native":
        if not native_available():
            raise RuntimeError(f'the backend "native" is not available: {load_error()}')
        if not serves:
            raise NotImplementedError(
                f'the backend "native" serves channel and split mode on the CPU, got {responsibility} on {input.device}'
            )
    return serves and native_available()


def _check(
    input: Tensor,
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    responsibility: str,
) -> None:
    """Raise where the arguments do not fit together; the messages name what was expected and what came."""
    if input.dtype not in _DTYPES:
        raise NotImplementedError(f"expected an input of {_DTYPES}, got {input.dtype}")
    if not 2 <= input.dim() <= 5:
        raise ValueError(f"expected 2D to 5D input (got {input.dim()}D input)")
    channels = input.shape[1]
    if mean.dim() != 2 or mean.shape[1] != channels:
        raise RuntimeError(
            f"expected running_mean of shape (M, {channels}) for an input of {channels} channels, "
            f"got {tuple(mean.shape)}"
        )
    components = mean.shape[0]
    if not 1 <= components <= 16:
        raise RuntimeError(f"expected 1 to 16 components, got {components}")
    prior_shape = (components,) if responsibility == "joint" else (components, channels)
    expected = [("running_var", var, mean.shape), ("weight", weight, mean.shape), ("bias", bias, mean.shape)]
    for name, tensor, shape in [("running_prior", prior, prior_shape), *expected]:
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(f"expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}")
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    allowed = (input.dtype, torch.float32) if narrow else (input.dtype,)
    for name, tensor in [("running_prior", prior), ("running_mean", mean), *((n, t) for n, t, _ in expected)]:
        if tensor is not None and tensor.dtype not in allowed:
            raise RuntimeError(
                f"expected {name} of {' or '.join(map(str, allowed))} for an input of {input.dtype}, got {tensor.dtype}"
            )
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"expected {name} on {input.device}, the input's device, got {tensor.device}")
    if training and input.shape.numel() // max(channels, 1) == 1 and channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")


class _Normalize(torch.autograd.Function):
    """Forward of every mode and backend. Saves x and per-channel tensors; responsibilities are recomputed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, groups, prior, mean, var, training, eps, responsibility, detach, native):
        arguments = (x, groups, prior, mean, var, weight, bias)
        if native:
            return ops.forward(*arguments, training=training, eps=eps)
        return reference.forward(
            *arguments,
            training=training,
            eps=eps,
            responsibility=responsibility,
            detach_responsibility=detach,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, groups, prior, mean, var, *ctx.options = inputs
        _, *batch = output
        ctx.mark_non_differentiable(*batch)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, groups, prior, mean, var, *batch)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 12
        grads = _NormalizeBackward.apply(grad, *ctx.saved_tensors, *ctx.options)
        needed = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[:3], strict=True))
        return *needed, *[None] * 9


class _NormalizeBackward(torch.autograd.Function):
    """Backward of `_Normalize`, differentiable in turn through the composite formula."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad, x, weight, bias, groups, prior, mean, var, mass, batch_mean, batch_var,
        training, eps, responsibility, detach, native,
    ):  # fmt: skip
        arguments = (grad, x, groups, prior, mean, var, mass, batch_mean, batch_var, weight, bias)
        if native:
            return ops.backward(*arguments, training=training, eps=eps, detach_responsibility=detach)
        return reference.backward(
            *arguments,
            training=training,
            eps=eps,
            responsibility=responsibility,
            detach_responsibility=detach,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, weight, bias, groups, prior, mean, var, _, _, _, *options, _ = inputs
        ctx.options = options
        ctx.save_for_backward(grad, x, weight, bias, groups, prior, mean, var)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad, x, weight, bias, groups, *running = ctx.saved_tensors
        training, eps, responsibility, detach = ctx.options
        # None (no affine) cannot be an argument of vjp; the gradients' formula is the same with 1 and 0.
        affine = [weight if weight is not None else torch.ones_like(running[1])]
        affine.append(bias if bias is not None else torch.zeros_like(running[1]))

        def output(x, weight, bias):
            return reference.forward(
                x, groups, *running, weight, bias,
                training=training, eps=eps, responsibility=responsibility, detach_responsibility=detach,
            )[0]  # fmt: skip

        def gradients(grad, x, weight, bias):
            return torch.func.vjp(output, x, weight, bias)[1](grad)

        results = torch.func.vjp(gradients, grad, x, *affine)[1](grad_grads)
        needed = (r if n else None for r, n in zip(results, ctx.needs_input_grad[:4], strict=True))
        return *needed, *[None] * 12
