"""How fast are the layers on a GPU? Inputs of CIFAR and ImageNet ResNets, in graph replay, within a time budget."""

import time
from collections.abc import Callable, Sequence
from itertools import product, zip_longest

import torch

import cbn_ext
from bench.compare import Comparison
from bench.cuda_compare import DeviceLostError, Failure, Measured, Timer, label, measure, measure_eager
from bench.providers import (
    BATCHNORM,
    BATCHNORM_ADD_RELU,
    BATCHNORM_ADD_RELU_COMPILED,
    BATCHNORM_COMPILED,
    BATCHNORM_RELU,
    BATCHNORM_RELU_COMPILED,
    OURS,
    OURS_ADD_RELU,
    OURS_RELU,
    OURS_SPLIT,
    PROVIDERS,
    REFERENCE,
    REFERENCE_COMPILED,
    Case,
)

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
_FUSED = ((OURS_RELU, 4), (BATCHNORM_RELU, 1), (OURS_ADD_RELU, 4), (BATCHNORM_ADD_RELU, 1))
_COMPILED = ((BATCHNORM_COMPILED, 1), (BATCHNORM_RELU_COMPILED, 1), (BATCHNORM_ADD_RELU_COMPILED, 1))
_REFERENCE = ((REFERENCE_COMPILED, 4), (REFERENCE, 4))
_SWEPT = tuple((name, 4) for name, provider in PROVIDERS.items() if provider.settings)

EAGER = "eager"
#: Seconds that a comparison is expected to take before one of its phase is measured: without and with compilation.
_FIRST_GUESS = (2.0, 15.0)


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
        *_phase("split", ((OURS_SPLIT, 4), *_UNIT), SHAPES, both),
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


def run(
    timer: Timer,
    copy_gb_per_s: float,
    plan: Sequence[Comparison],
    seconds: float,
    say: Callable[[str], None],
    save: Callable[[Measured], None],
    clock: Callable[[], float] = time.monotonic,
) -> Measured:
    """Measure one comparison after the other for about `seconds`, and hand what was found to `save` after each.

    A comparison is left out where less time remains than the longest of its phase took.
    """
    start = clock()
    found = Measured()
    longest: dict[str, float] = {}  # seconds, by phase
    for number, comparison in enumerate(plan):
        where, phase = label(comparison.case), comparison.phase
        begin = clock()
        guess = _FIRST_GUESS[any(PROVIDERS[name].compiled for name, _ in comparison.members)]
        if seconds - (begin - start) < longest.get(phase, guess):
            found.left_out.setdefault(phase, []).append(where)
            continue
        say(f"{begin - start:4.0f} s, {number + 1} of {len(plan)}, {phase}: {where}")
        try:
            with cbn_ext.use_backend("native"):
                (measure_eager if phase == EAGER else measure)(comparison, timer, copy_gb_per_s, found)
        except (DeviceLostError, KeyboardInterrupt) as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else "the device failed"
            for rest in plan[number:]:
                found.left_out.setdefault(rest.phase, []).append(f"{label(rest.case)} ({why})")
            break
        except Exception as error:  # such as memory that does not suffice for the inputs: the others are measured
            found.failures.append(Failure.of("the inputs", comparison.case, error, ours=False))
        finally:
            found.seconds = clock() - start
            save(found)
        longest[phase] = max(longest.get(phase, 0.0), clock() - begin)
    return found
