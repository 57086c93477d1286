"""Compound batch normalization layers: drop-in for nn.BatchNorm1d, 2d and 3d, with M Gaussians in place of one."""

import torch
from torch import Tensor, nn

from .checks import is_relu, mode_of
from .functional import compound_batch_norm, split_batch_norm
from .split import current_groups
from .start import start_mixture

_AFFINE_STARTS = ("preserve", "unit")


class _CompoundBatchNorm(nn.Module):
    """Parameters, running state and its (de)serialisation; the subclasses say which inputs they take.

    Not a subclass of nn.BatchNorm: tools that look for one, such as `convert_sync_batchnorm`, would replace the layer.
    """

    _version = 1
    _input_dims: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        num_components: int = 4,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        responsibility: str = "channel",
        detach_responsibility: bool = False,
        affine_init: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not 1 <= num_components <= 16:
            raise ValueError(f"expected 1 <= num_components <= 16, got {num_components}")
        if responsibility not in ("channel", "joint"):
            raise ValueError(f'expected responsibility "channel" or "joint", got {responsibility!r}')
        if affine_init is None:
            affine_init = "preserve" if responsibility == "channel" else "unit"
        if affine_init not in _AFFINE_STARTS:
            raise ValueError(f"expected affine_init None or one of {_AFFINE_STARTS}, got {affine_init!r}")
        self.num_features = num_features
        self.num_components = num_components
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.responsibility = responsibility
        self.detach_responsibility = detach_responsibility
        self.affine_init = affine_init

        shape = (num_components, num_features)
        prior_shape = shape if responsibility == "channel" else (num_components,)
        factory = {"device": device, "dtype": dtype}
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)) if affine else None)
        state = {"running_prior": prior_shape, "running_mean": shape, "running_var": shape}
        for name, size in state.items():
            self.register_buffer(name, torch.empty(size, **factory) if track_running_stats else None)
        count = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def _start_mixture(self, like: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.num_components, self.num_features)
        return start_mixture(*shape, mode_of(self.responsibility), order, device=like.device, dtype=like.dtype)

    def _mixture(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The running statistics; where none are kept the start mixture, which the E-step needs."""
        tracked = (self.running_prior, self.running_mean, self.running_var)
        return tracked if self.track_running_stats else self._start_mixture(like)

    def reset_running_stats(self) -> None:
        """Start values: equal priors, equal variances, means spread in a random order of its own in each channel."""
        if self.track_running_stats:
            order = torch.rand(self.num_components, self.num_features, device=self.running_mean.device).argsort(0)
            start = self._start_mixture(self.running_mean, order)
            for running, value in zip(self._mixture(self.running_mean), start, strict=True):
                running.copy_(value)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Reset the running statistics and start the affine parameters from them as `affine_init` says."""
        self.reset_running_stats()
        if not self.affine:
            return
        with torch.no_grad():
            if self.affine_init == "unit":
                self.weight.fill_(1)
                self.bias.zero_()
            else:
                _, mean, var = self._mixture(self.weight)
                self.weight.copy_(var.sqrt())
                self.bias.copy_(mean)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (N, C, ...); in training mode inside `split_path`, by the images' groups.

        Raises:
            ValueError: a wrong number of dimensions, or one value per channel in training.
            RuntimeError: a wrong number of channels, or dtypes or devices that do not fit.
        """
        return self._normalize(input)

    def _normalize(self, input: Tensor, **fused) -> Tensor:
        if input.dim() not in self._input_dims:
            expected = " or ".join(f"{d}D" for d in self._input_dims)
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")
        if input.shape[1] != self.num_features:
            raise RuntimeError(f"expected an input of {self.num_features} channels, got {input.shape[1]}")

        running = self._mixture(self.weight if self.affine else input)
        momentum = None
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            # Cumulative average: a tensor, because reading the count would wait for the device.
            momentum = 1.0 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        groups = current_groups()
        if self.training and groups is not None:
            return split_batch_norm(input, groups, *running[1:], self.weight, self.bias, momentum, self.eps, **fused)
        training = self.training or not self.track_running_stats
        options = (training, momentum, self.eps, self.responsibility, self.detach_responsibility)
        return compound_batch_norm(input, *running, self.weight, self.bias, *options, **fused)

    def extra_repr(self) -> str:
        """The arguments the layer was made with."""
        return (
            f"{self.num_features}, num_components={self.num_components}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, "
            f"responsibility={self.responsibility!r}, detach_responsibility={self.detach_responsibility}, "
            f"affine_init={self.affine_init!r}"
        )

    @torch.no_grad()
    def load_batchnorm(
        self, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Become the batch normalization with these (C,) tensors: same output in evaluation, M components.

        The start mixture is laid over the running statistics. Every component's affine pair is the given one seen from
        the component ("preserve"), so that all branches agree, or the given one as it is ("unit"). None stands for mean
        and bias 0, variance and weight 1.
        """
        like = self.weight if self.affine else self.running_mean
        if like is None:
            return
        zeros, ones = like.new_zeros(self.num_features), like.new_ones(self.num_features)
        mean, bias = (zeros if t is None else t.to(like) for t in (mean, bias))
        var, weight = (ones if t is None else t.to(like) for t in (var, weight))
        if self.track_running_stats:
            self.reset_running_stats()
            self.running_mean.mul_(var.sqrt()).add_(mean)
            self.running_var.mul_(var)
        if self.affine and self.affine_init == "unit":
            self.weight.copy_(weight.expand_as(self.weight))
            self.bias.copy_(bias.expand_as(self.bias))
        elif self.affine:
            _, start_mean, start_var = self._mixture(like)
            scale = weight * torch.rsqrt(var + self.eps)
            self.weight.copy_(scale * torch.sqrt(start_var + self.eps))
            self.bias.copy_(bias + scale * (start_mean - mean))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        """Load, also from the checkpoint of an nn.BatchNorm, whose tensors are (C,) and which knows no prior."""
        names = ("running_mean", "running_var", "weight", "bias")
        found = {name: state_dict.get(prefix + name) for name in names}
        # The same tensors are there as here, one row of each.
        from_batchnorm = "running_prior" not in {key.removeprefix(prefix) for key in state_dict} and all(
            (tensor is None) == (getattr(self, name) is None)
            and (tensor is None or tensor.shape == (self.num_features,))
            for name, tensor in found.items()
        )
        if from_batchnorm:
            self.load_batchnorm(*found.values())
            state_dict = {**state_dict}
            for name in (*names, "running_prior"):
                if getattr(self, name) is not None:
                    state_dict[prefix + name] = getattr(self, name).detach().clone()
            if self.track_running_stats:
                # Checkpoints of nn.BatchNorm before its version 2 do not count.
                state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(0))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


_ARGUMENTS = """

    The batch's points update a mixture of M Gaussians by one step of running EM; a point is normalised by every
    component and the results are combined by its responsibilities ("Compound Batch Normalization for Long-tailed
    Image Classification", section 3.2). With one component this is batch normalization.

    Args:
        num_features: channels C.
        num_components: Gaussians M, 1 to 16.
        eps: ε, added to every variance.
        momentum: λ, the weight of the batch in the running statistics; None for a cumulative average.
        affine: learn `weight` and `bias` (M, C).
        track_running_stats: keep `running_prior` (M, C), or (M,) in joint mode, and `running_mean`, `running_var`
            (M, C). Without, these are None, batch statistics serve in evaluation too, and the responsibilities come
            from the start mixture.
        responsibility: "channel", a one-dimensional mixture for each channel, or "joint", one mixture over the
            C-dimensional features of a point.
        detach_responsibility: treat the responsibilities as constants in the gradient (classical EM; cheaper).
        affine_init: "preserve" makes the components agree at the start, the layer then is batch normalization;
            "unit" starts with weight 1 and bias 0, which the split path needs. None: "preserve" in channel mode, "unit"
            in joint mode.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: an argument outside of what is named here.
    """


class CompoundBatchNorm1d(_CompoundBatchNorm):
    __doc__ = "Compound batch normalization of (N, C) or (N, C, L) inputs." + _ARGUMENTS
    _input_dims = (2, 3)


class CompoundBatchNorm2d(_CompoundBatchNorm):
    __doc__ = "Compound batch normalization of (N, C, H, W) inputs." + _ARGUMENTS
    _input_dims = (4,)


class CompoundBatchNorm3d(_CompoundBatchNorm):
    __doc__ = "Compound batch normalization of (N, C, D, H, W) inputs." + _ARGUMENTS
    _input_dims = (5,)


class _ActivatedNorm(_CompoundBatchNorm):
    """Adds a residual and an activation to the layers without."""

    def __init__(self, *arguments, activation: str | None = "relu", **options) -> None:
        is_relu(activation)  # raises where it is unknown
        super().__init__(*arguments, **options)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(cbn(input) + residual), both (N, C, ...); None stands for 0.

        Raises:
            ValueError: a wrong number of dimensions, or one value per channel in training.
            RuntimeError: a wrong number of channels, or shapes, dtypes or devices that do not fit.
        """
        return self._normalize(input, residual=residual, activation=self.activation)

    def extra_repr(self) -> str:
        """The arguments the layer was made with."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


_FUSED = """

    `layer(x, residual=None)` is act(cbn(x) + residual), computed in the passes over x that the normalization makes.
    Kept for backward is x alone, with a residual also one bit per element. Parameters, state and all other arguments
    are those of the layer without `Act` in its name.

    Args:
        activation: "relu", or None for none.

    Raises:
        ValueError: an argument outside of what is named here and there.
    """


class CompoundBatchNormAct1d(_ActivatedNorm, CompoundBatchNorm1d):
    __doc__ = "Compound batch normalization of (N, C) or (N, C, L) inputs, a residual and a ReLU in one." + _FUSED


class CompoundBatchNormAct2d(_ActivatedNorm, CompoundBatchNorm2d):
    __doc__ = "Compound batch normalization of (N, C, H, W) inputs, a residual and a ReLU in one." + _FUSED


class CompoundBatchNormAct3d(_ActivatedNorm, CompoundBatchNorm3d):
    __doc__ = "Compound batch normalization of (N, C, D, H, W) inputs, a residual and a ReLU in one." + _FUSED
