"""The float64 oracle: compound and split batch normalization written once more, straight from the formulas.

Nothing here comes from `cbn_ext`. The responsibilities are an argument of everything after the E-step, the densities
are `torch.distributions`' and every derivative is autograd's, so an error in a hand-derived rule cannot hide here.

Symbols: N images, C channels, S... spatial sizes, M components, P = N * prod(S) points per channel.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Normal

PRIOR_FLOOR = 1e-6  # of the prior inside the logarithm
MASS_FLOOR = 1e-30  # below it a component has lost its batch and keeps its running statistics


@dataclass(frozen=True)
class Step:
    """One training step in float64; all statistics are (M, C), the prior is (M,) in joint mode."""

    y: Tensor  # (N, C, S...)
    mass: Tensor  # n, responsibility summed over the batch
    mean: Tensor  # batch mean; where the mass is zero the running mean
    var: Tensor  # biased batch variance; where the mass is zero the running variance
    running_prior: Tensor | None
    running_mean: Tensor
    running_var: Tensor


def per_component(statistic: Tensor, x: Tensor) -> Tensor:
    """(M, C) or (M,) to (M, 1, C or 1, 1...), which broadcasts against x (N, C, S...)."""
    channels = statistic.shape[1] if statistic.ndim == 2 else 1
    return statistic.reshape(statistic.shape[0], 1, channels, *[1] * (x.ndim - 2))


def posterior(
    x: Tensor, prior: Tensor, mean: Tensor, var: Tensor, eps: float, responsibility: str = "channel"
) -> Tensor:
    """E-step, paper eqs 8-9: p (M, N, C, S...) of x (N, C, S...) under the mixture (M, C)."""
    density = Normal(per_component(mean, x), per_component(var + eps, x).sqrt(), validate_args=False)
    log_density = density.log_prob(x)
    if responsibility == "joint":
        log_density = log_density.sum(2, keepdim=True).expand_as(log_density)
    return torch.softmax(log_density + per_component(prior.clamp(min=PRIOR_FLOOR).log(), x), 0)


def indicator(x: Tensor, groups: Tensor, components: int) -> Tensor:
    """Split path, paper eqs 17-18: p (M, N, C, S...) is 1 for the component of the image's group."""
    rows = [(groups == m).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)).expand_as(x) for m in range(components)]
    return torch.stack(rows)


def moments(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M-step, paper eqs 10-12: mass, mean and biased variance (M, C), nan for a component without mass."""
    over = [1, *range(3, p.ndim)]
    mass = p.sum(over)
    mean = (p * x).sum(over) / mass
    var = (p * (x - per_component(mean, x)).square()).sum(over) / mass
    return mass, mean, var


def combine(
    x: Tensor, p: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Paper eqs 7 and 16: every component normalises, scales and shifts; p mixes the results to (N, C, S...)."""
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    normalized = (x - per_component(mean, x)) / (per_component(var, x) + eps).sqrt()
    return (p * (per_component(weight, x) * normalized + per_component(bias, x))).sum(0)


def double(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.double() for t in tensors)


def train_step(
    x: Tensor,
    prior: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    groups: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    responsibility: str = "channel",
    detach_responsibility: bool = False,
) -> Step:
    """One training step; `groups` (N,) selects the split path, which takes no prior. Any dtype in, float64 out."""
    x, prior, mean, var, weight, bias = double(x, prior, mean, var, weight, bias)
    compound = groups is None
    p = posterior(x, prior, mean, var, eps, responsibility) if compound else indicator(x, groups, mean.shape[0])
    if detach_responsibility:
        p = p.detach()

    alive = p.detach().sum([1, *range(3, p.ndim)]) >= MASS_FLOOR
    # An epsilon of mass keeps the division of a component without any away from 0/0, whose nan gradient would
    # survive torch.where; it is far below float64's resolution of any other mass.
    mass, batch_mean, batch_var = moments(x, p + MASS_FLOOR * per_component((~alive).to(x.dtype), x))
    batch_mean = torch.where(alive, batch_mean, mean)
    batch_var = torch.where(alive, batch_var, var)
    y = combine(x, p, batch_mean, batch_var, weight, bias, eps)

    with torch.no_grad():
        mass = torch.where(alive, mass, torch.zeros_like(mass))
        unbiased = batch_var * mass / (mass - 1).clamp(min=1)
        new_mean = torch.where(alive, mean.lerp(batch_mean, momentum), mean)
        new_var = torch.where(alive, var.lerp(unbiased, momentum), var)
        new_prior = prior
        if groups is None:
            points = x.numel() // x.shape[1]
            share = mass / points
            new_prior = prior.lerp(share[:, 0] if responsibility == "joint" else share, momentum)
    return Step(y, mass, batch_mean, batch_var, new_prior, new_mean, new_var)


def evaluate(
    x: Tensor,
    prior: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    responsibility: str = "channel",
    detach_responsibility: bool = False,
) -> Tensor:
    """Evaluation: y (N, C, S...) with the running statistics in both steps. Any dtype in, float64 out."""
    x, prior, mean, var, weight, bias = double(x, prior, mean, var, weight, bias)
    p = posterior(x, prior, mean, var, eps, responsibility)
    return combine(x, p.detach() if detach_responsibility else p, mean, var, weight, bias, eps)


def log_likelihood(
    x: Tensor, prior: Tensor, mean: Tensor, var: Tensor, eps: float, responsibility: str = "channel"
) -> float:
    """Total log-likelihood of x (N, C, S...) under the mixture whose variances are var + eps."""
    x, prior, mean, var = double(x, prior, mean, var)
    joint = responsibility == "joint"
    log_density = Normal(per_component(mean, x), per_component(var + eps, x).sqrt()).log_prob(x)
    log_density = log_density.sum(2, keepdim=True) if joint else log_density
    return math.fsum(torch.logsumexp(log_density + per_component(prior, x).log(), 0).flatten().tolist())
