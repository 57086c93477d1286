"""From nn.BatchNorm to compound batch normalization, in a whole network."""

import logging

from torch import nn

from .fuse import assemble, fuse_graph
from .modules import (
    CompoundBatchNorm1d,
    CompoundBatchNorm2d,
    CompoundBatchNorm3d,
    CompoundBatchNormAct1d,
    CompoundBatchNormAct2d,
    CompoundBatchNormAct3d,
)
from .trace import trace

_log = logging.getLogger("cbn_ext")

# The layer, and the one with a ReLU.
_LAYERS = {
    nn.BatchNorm1d: (CompoundBatchNorm1d, CompoundBatchNormAct1d),
    nn.BatchNorm2d: (CompoundBatchNorm2d, CompoundBatchNormAct2d),
    nn.BatchNorm3d: (CompoundBatchNorm3d, CompoundBatchNormAct3d),
}


def convert_compound_batchnorm(module: nn.Module, num_components: int = 4, fuse: bool = False, **options) -> nn.Module:
    """Replace every nn.BatchNorm1d, 2d and 3d in `module` by the compound layer.

    The layers take over eps, momentum, running statistics, affine parameters and hooks: with the preserving start,
    which is the default here in either mode, the network gives the outputs in evaluation that it gave before.

    With `fuse`, torch.fx looks for batch normalization -> (+ residual) -> ReLU, puts one `CompoundBatchNormAct` in its
    place, and the network becomes a `torch.fx.GraphModule`: the same names, state_dict, outputs and gradients, but one
    callable, of which only parts without a batch normalization can be called by themselves. `meta["fusions"]` of it is
    a tuple with a `cbn_ext.fuse.Fusion` for each batch normalization: fused, or the reason why not. The same goes to
    the logger "cbn_ext", at level INFO. Arguments of forward that have a default keep it, and activation checkpoints
    are lost. A residual must have the shape and dtype of the normalization's output; if it has not, which cannot be
    known before the network runs, the fused layer raises then.

    Args:
        module: changed in place, unless it is itself a batch normalization. With `fuse` it stays as it is, and the
            result shares its other layers and parameters.
        num_components: M, 1 to 16.
        fuse: fuse ReLUs, and sums before them, into the layers.
        options: `responsibility`, `detach_responsibility` and `affine_init` of `CompoundBatchNorm2d`. For training with
            the split path choose `affine_init="unit"`: every component then starts with the given affine pair as it is.

    Returns:
        The module, or the layer that replaces it; with `fuse` a GraphModule.

    Raises:
        TypeError: an option the layers do not have, or one that is taken from the layer replaced.
        ValueError: with `fuse`, a module that torch.fx cannot trace or whose forward a graph cannot express: control
            flow on its input's values or on `training`, attributes set, hooks on a module around normalizations.
    """
    allowed = {"responsibility", "detach_responsibility", "affine_init"}
    if unknown := options.keys() - allowed:
        raise TypeError(f"expected options among {sorted(allowed)}, got {sorted(unknown)}")
    options = {"affine_init": "preserve", **options}
    if fuse:
        return _fused(module, num_components, options)
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


def _fused(module: nn.Module, num_components: int, options: dict) -> nn.Module:
    graph = trace(module)
    fusions = fuse_graph(module, graph)
    layers = {}
    for fusion in fusions:
        norm = module.get_submodule(fusion.norm)
        layers[norm] = _compound(norm, num_components, options, fused=fusion.reason is None)
    network = assemble(module, graph, layers)
    network.meta["fusions"] = fusions
    _log.info("%d of %d batch normalizations fused", sum(f.reason is None for f in fusions), len(fusions))
    for fusion in fusions:
        _log.info("%s", fusion)
    return network


def _compound(
    norm: nn.modules.batchnorm._BatchNorm, num_components: int, options: dict, fused: bool = False
) -> nn.Module:
    like = norm.weight if norm.affine else norm.running_mean
    factory = {} if like is None else {"device": like.device, "dtype": like.dtype}
    arguments = (norm.num_features, num_components, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    layer = _LAYERS[type(norm)][fused](*arguments, **options, **factory)
    layer.load_batchnorm(norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if norm.affine:
        layer.weight.requires_grad_(norm.weight.requires_grad)
        layer.bias.requires_grad_(norm.bias.requires_grad)
    if norm.num_batches_tracked is not None:
        layer.num_batches_tracked.copy_(norm.num_batches_tracked)
    # The very dictionaries, so that the handles given out for the hooks still remove them.
    vars(layer).update((name, value) for name, value in vars(norm).items() if "_hook" in name)
    return layer.train(norm.training)
