"""The mixture that layers start from."""

import torch
from torch import Tensor

from .options import Mode

#: Share of the start mixture's unit variance that lies between its components (the rest lies within each).
_SPREAD = 0.5


def start_mixture(
    components: int, channels: int, mode: Mode, order: Tensor | None = None, **factory
) -> tuple[Tensor, Tensor, Tensor]:
    """Prior (M, C), or (M,) in joint mode, mean and variance (M, C) of a mixture with mean 0 and variance 1.

    The components' means are equally spaced; `order` (M, C) says which component of a channel takes which of them. By
    default component m of channel c takes the one numbered (m + c) mod M, so that no component is lowest everywhere.
    """
    shape = (components, channels)
    if order is None:
        order = torch.arange(components)[:, None] + torch.arange(channels)
        order = (order % components).to(factory.get("device"))
    spread = _SPREAD if components > 1 else 0.0
    # linspace(-1, 1, M) has variance (M + 1) / (3 (M - 1)).
    scale = (3 * spread * (components - 1) / (components + 1)) ** 0.5
    points = torch.linspace(-scale, scale, components, **factory) if components > 1 else torch.zeros(1, **factory)
    return (
        torch.full(shape[:1] if mode is Mode.JOINT else shape, 1 / components, **factory),
        points[order],
        torch.full(shape, 1 - spread, **factory),
    )
