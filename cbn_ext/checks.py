"""Checks of the public functions' arguments; the messages name what was expected and what came."""

import torch
from torch import Tensor

from .options import Mode, Options

_MODES = {"channel": Mode.CHANNEL, "joint": Mode.JOINT}
_ACTIVATIONS = (None, "relu")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PER_CHANNEL = ("running_prior", "running_mean", "running_var", "weight", "bias")


def mode_of(responsibility: str) -> Mode:
    """The mode of a mixture."""
    if responsibility not in _MODES:
        raise ValueError(f"expected responsibility in {tuple(_MODES)}, got {responsibility!r}")
    return _MODES[responsibility]


def is_relu(activation: str | None) -> bool:
    """True for a ReLU, False for no activation."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"expected activation in {_ACTIVATIONS}, got {activation!r}")
    return activation == "relu"


def is_integer(groups: Tensor) -> bool:
    """True where the groups can be indices of components."""
    return not (groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool)


def check_groups(x: Tensor, groups: Tensor) -> None:
    """The groups (N,) of x (N, C, ...); their values are the backend's to check."""
    if groups.dim() != 1 or groups.shape[0] != x.shape[0]:
        raise RuntimeError(
            f"expected one group for each of the {x.shape[0]} images, got groups of shape {tuple(groups.shape)}"
        )
    if not is_integer(groups):
        raise RuntimeError(f"expected integer groups, got {groups.dtype}")
    _check_device("groups", groups, x)


def check_tensors(tensors: tuple[Tensor | None, ...], options: Options) -> None:
    """Input, residual like it, groups (not looked at); prior, mean, var, weight, bias (M, C), a joint prior (M,)."""
    x, residual, _, *per_channel = tensors
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f"expected an input of {_DTYPES}, got {x.dtype}")
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"expected 2D to 5D input (got {x.dim()}D input)")
    channels, shape = x.shape[1], per_channel[1].shape
    if len(shape) != 2 or shape[1] != channels:
        raise RuntimeError(
            f"expected running_mean of shape (M, {channels}) for an input of {channels} channels, got {tuple(shape)}"
        )
    if not 1 <= shape[0] <= 16:
        raise RuntimeError(f"expected 1 to 16 components, got {shape[0]}")
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    allowed = (x.dtype, torch.float32) if narrow else (x.dtype,)
    for name, tensor in zip(_PER_CHANNEL, per_channel, strict=True):
        if tensor is None:
            continue
        expected = shape[:1] if name == "running_prior" and options.mode is Mode.JOINT else shape
        if tensor.shape != expected:
            raise RuntimeError(f"expected {name} of shape {tuple(expected)}, got {tuple(tensor.shape)}")
        if tensor.dtype not in allowed:
            raise RuntimeError(
                f"expected {name} of {' or '.join(map(str, allowed))} for an input of {x.dtype}, got {tensor.dtype}"
            )
        _check_device(name, tensor, x)
    if residual is not None:
        # No broadcasting: its gradient is the output's, masked.
        if residual.shape != x.shape:
            raise RuntimeError(f"expected residual of shape {tuple(x.shape)}, the input's, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise RuntimeError(f"expected residual of {x.dtype}, the input's dtype, got {residual.dtype}")
        _check_device("residual", residual, x)
    if options.training and channels and x.numel() == channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(f"expected {name} on {x.device}, the input's device, got {tensor.device}")
