"""Compound and split batch normalization as functions: arguments checked, backend chosen, statistics updated."""

from types import ModuleType

import torch
from torch import Tensor

from . import ops, reference
from ._extension import backend, load_error, warn_of_fallback
from .autograd import Normalize
from .checks import check_groups, check_tensors, is_relu, mode_of
from .options import Mode, Options
from .start import start_mixture


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
        NotImplementedError: a dtype that is not supported.
    """
    mode = mode_of(responsibility)
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
        running = start_mixture(num_components, input.shape[1], mode, device=input.device, dtype=dtype)
        momentum = None
    options = Options(mode, training, is_relu(activation), detach_responsibility, eps)
    return _normalize((input, residual, None, *running, weight, bias), options, momentum)


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
        weight, bias, momentum, eps, residual, activation: as for `compound_batch_norm`.

    Returns:
        Of the input's shape, dtype and memory format.

    Raises:
        ValueError: one value per channel in the whole batch, or an unknown activation.
        RuntimeError: shapes, dtypes, devices or groups that do not fit together.
        NotImplementedError: a dtype that is not supported.
    """
    if running_mean is None or running_var is None:
        raise RuntimeError("expected running_mean and running_var, which tell the number of components, got None")
    check_groups(input, groups)
    options = Options(Mode.GROUPS, True, is_relu(activation), False, eps)
    # Asked only where it changes something: a call of torch shows at small sizes.
    groups = groups if groups.dtype == torch.long else groups.long()
    return _normalize((input, residual, groups, None, running_mean, running_var, weight, bias), options, momentum)


def _normalize(tensors: tuple[Tensor | None, ...], options: Options, momentum: float | Tensor | None) -> Tensor:
    """The output for (x, residual, groups, prior, mean, var, weight, bias), the order of every layer below."""
    check_tensors(tensors, options)
    x, residual, groups, prior, mean, var, weight, bias = tensors
    backend = _choose_backend(x.device.type)
    dtype = reference.compute_dtype(x.dtype)
    per_channel = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (prior, mean, var, weight, bias))
    y, _, _, batch, _ = Normalize.apply(x, residual, groups, *per_channel, options, backend)
    if options.training and momentum is not None:
        # The native update takes a number, and statistics of the dtype they were used in.
        update = (reference if isinstance(momentum, Tensor) or mean.dtype != dtype else backend).update_running
        with torch.no_grad():
            update(prior, mean, var, batch, x.numel() // max(x.shape[1], 1), momentum)
    return y


def _choose_backend(device: str) -> ModuleType:
    """The module that computes this call, `ops` or `reference`: both have the same functions."""
    choice = backend()
    if choice == "reference":
        return reference
    if load_error(device) is None:
        return ops
    if choice == "native":
        raise RuntimeError(f'the backend "native" is not available: {load_error(device)}')
    warn_of_fallback(device)
    return reference
