"""What is compared on a GPU: inputs of CIFAR and ImageNet ResNets, phase by phase."""

from collections.abc import Sequence
from itertools import product, zip_longest

import torch

from bench.cases import ADD_RELU, OPERATIONS, RELU, Case
from bench.providers import BATCHNORM, COMPILED, JOINT, OURS, PROVIDERS, REFERENCE, SPLIT, Comparison

LAYOUTS = ("contiguous", "channels_last")
CIFAR_SHAPES = ((128, 32, 16, 16), (128, 16, 32, 32), (128, 64, 8, 8))
_RESNET50 = ((256, 56), (1024, 14), (64, 112), (512, 28), (64, 56), (2048, 7))
RESNET50_SHAPES, LARGE_SHAPES = (tuple((n, c, size, size) for c, size in _RESNET50) for n in (64, 256))
#: In the order in which they are measured.
SHAPES = tuple(s for pair in zip_longest(RESNET50_SHAPES, CIFAR_SHAPES) for s in pair if s is not None)
#: Where the time of an eager step is that of the host.
EAGER_SHAPES = ((128, 64, 8, 8), (8, 16, 8, 8))
#: Where settings of the operators are compared.
SWEEP_SHAPES = ((64, 256, 56, 56), (64, 64, 56, 56), (128, 16, 32, 32), (64, 512, 28, 28), (64, 1024, 14, 14))

_UNIT = ((BATCHNORM, 1),)
_PLAIN = ((OURS, 4), *_UNIT)
_FUSED = tuple(
    member for operation in (RELU, ADD_RELU) for member in ((OURS + operation, 4), (BATCHNORM + operation, 1))
)
_COMPILED = tuple((BATCHNORM + operation + COMPILED, 1) for operation in OPERATIONS)
_REFERENCE = ((REFERENCE + COMPILED, 4), (REFERENCE, 4))
_SWEPT = tuple((name, 4) for name, provider in PROVIDERS.items() if provider.settings)

EAGER = "eager"


def comparisons() -> list[Comparison]:
    """All that is to be compared, the most important phase over all shapes first.

    Some members are in several phases, for ratios need both times from one comparison; the first time stands for each.
    """
    both, single = (torch.float32, torch.bfloat16), (torch.float32,)
    contiguous = LAYOUTS[:1]
    return [
        *_phase("plain", _PLAIN, SHAPES, both),
        *_phase("fused", _UNIT + _FUSED, SHAPES, both),
        *_phase(EAGER, (*_PLAIN, (OURS, 1)), EAGER_SHAPES, single, contiguous),
        *_phase("split", ((OURS + SPLIT, 4), *_UNIT), SHAPES, both),
        *_phase("joint", ((OURS + JOINT, 4), (OURS + JOINT, 8), *_UNIT), SHAPES, both),
        *_phase("compiled", _PLAIN + _FUSED + _COMPILED, SHAPES, both),
        # The eager reference takes dozens of times the others' time and memory.
        *_phase("reference", _PLAIN + _REFERENCE, SHAPES[:3], both),
        *_phase("components", (*_UNIT, (OURS, 1), (OURS, 2), (OURS, 8)), SHAPES, both, contiguous),
        *_phase("float16", _PLAIN + _FUSED, SHAPES, (torch.float16,)),
        *_phase("batch 256", _PLAIN + _FUSED, LARGE_SHAPES, both),
        *_phase("saturated", _PLAIN, SHAPES[:1], single, contiguous, "saturated"),
        *_phase("constant", _PLAIN, SHAPES[:1], single, contiguous, "constant"),
    ]


def sweep() -> list[Comparison]:
    """The operators' own choice of path and constants beside all that it could have been."""
    return _phase("sweep", _PLAIN + _SWEPT, SWEEP_SHAPES, (torch.float32, torch.bfloat16))


def _phase(
    name: str,
    members: tuple[tuple[str, int], ...],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    layouts: Sequence[str] = LAYOUTS,
    data: str = "mixed",
) -> list[Comparison]:
    """Every dtype and layout of a shape comes before the next shape, so that means are over the same shapes in each."""
    return [
        Comparison(Case(shape, layout=layout, dtype=dtype, data=data, device="cuda"), members, name)
        for shape, layout, dtype in product(shapes, layouts, dtypes)
    ]
