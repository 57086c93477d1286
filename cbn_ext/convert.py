"""From nn.BatchNorm to compound batch normalization, in a whole network."""

from torch import nn

from .modules import CompoundBatchNorm1d, CompoundBatchNorm2d, CompoundBatchNorm3d

_LAYERS = {
    nn.BatchNorm1d: CompoundBatchNorm1d,
    nn.BatchNorm2d: CompoundBatchNorm2d,
    nn.BatchNorm3d: CompoundBatchNorm3d,
}


def convert_compound_batchnorm(module: nn.Module, num_components: int = 4, **options) -> nn.Module:
    """Replace every nn.BatchNorm1d, 2d and 3d in `module` by the compound layer.

    The layers take over eps, momentum, running statistics and affine parameters: with the preserving start, which is
    the default here in either mode, the network gives the outputs in evaluation that it gave before.

    Args:
        module: changed in place, unless it is itself a batch normalization.
        num_components: M, 1 to 16.
        options: `responsibility`, `detach_responsibility` and `affine_init` of `CompoundBatchNorm2d`. For training with
            the split path choose `affine_init="unit"`: every component then starts with the given affine pair as it is.

    Returns:
        The module, or the layer that replaces it.

    Raises:
        TypeError: an option the layers do not have, or one that is taken from the layer replaced.
    """
    allowed = {"responsibility", "detach_responsibility", "affine_init"}
    if unknown := options.keys() - allowed:
        raise TypeError(f"expected options among {sorted(allowed)}, got {sorted(unknown)}")
    options = {"affine_init": "preserve", **options}
    replaced: dict[nn.Module, nn.Module] = {}

    def convert(layer: nn.Module) -> nn.Module:
        if layer not in replaced:
            replaced[layer] = _compound(layer, num_components, options) if type(layer) in _LAYERS else layer
            # Not named_children(), which gives a module that stands under two names only once.
            for name, child in layer._modules.items():
                if child is not None:
                    layer._modules[name] = convert(child)
        return replaced[layer]

    return convert(module)


def _compound(norm: nn.modules.batchnorm._BatchNorm, num_components: int, options: dict) -> nn.Module:
    like = norm.weight if norm.affine else norm.running_mean
    factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
    layer = _LAYERS[type(norm)](
        norm.num_features,
        num_components,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        **options,
        **factory,
    )
    layer.load_batchnorm(norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if norm.affine:
        layer.weight.requires_grad_(norm.weight.requires_grad)
        layer.bias.requires_grad_(norm.bias.requires_grad)
    if norm.num_batches_tracked is not None:
        layer.num_batches_tracked.copy_(norm.num_batches_tracked)
    return layer.train(norm.training)
