"""How fast are the layers on a GPU? Inputs of CIFAR and ImageNet ResNets, in graph replay, within a time budget."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch

import cbn_ext
from bench.compare import Comparison
from bench.cuda_compare import DeviceLostError, Failure, Measured, Timer, label, measure
from bench.providers import (
    BATCHNORM,
    BATCHNORM_ADD_RELU,
    BATCHNORM_ADD_RELU_COMPILED,
    BATCHNORM_COMPILED,
    BATCHNORM_RELU,
    BATCHNORM_RELU_COMPILED,
    ONE_BLOCK,
    OURS,
    OURS_ADD_RELU,
    OURS_RELU,
    PROVIDERS,
    REFERENCE,
    REFERENCE_COMPILED,
    STREAMING,
    Case,
)

LAYOUTS = ("contiguous", "channels_last")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CIFAR_SHAPES = ((128, 32, 16, 16), (128, 16, 32, 32), (128, 64, 8, 8))
_RESNET50 = ((256, 56), (1024, 14), (64, 112), (512, 28), (64, 56), (2048, 7))
RESNET50_SHAPES, LARGE_SHAPES = (tuple((n, c, size, size) for c, size in _RESNET50) for n in (64, 256))
#: In the order in which they are measured.
SHAPES = tuple(s for pair in zip_longest(RESNET50_SHAPES, CIFAR_SHAPES) for s in pair if s is not None)
#: The eager reference takes dozens of times the others' time and memory: it is measured here only.
REFERENCE_SHAPES = SHAPES[:3]

_MAIN = (
    (OURS, 4),
    (BATCHNORM, 1),
    (OURS_RELU, 4),
    (BATCHNORM_RELU, 1),
    (OURS_ADD_RELU, 4),
    (BATCHNORM_ADD_RELU, 1),
)
_COMPONENTS = ((OURS, 1), (OURS, 2), (OURS, 8))
_PATHS = ((STREAMING, 4), (ONE_BLOCK, 4))
_COMPILED = (
    (BATCHNORM_COMPILED, 1),
    (BATCHNORM_RELU_COMPILED, 1),
    (BATCHNORM_ADD_RELU_COMPILED, 1),
    (REFERENCE_COMPILED, 4),
)


def comparisons() -> list[Comparison]:
    """All that is to be compared, the most important first: the last ones are left out when time runs short.

    Every dtype and layout of a shape comes before the next shape, so that means are over the same shapes in each.
    """
    plan = []
    for shape in SHAPES:
        for layout in LAYOUTS:
            for dtype in _DTYPES:
                members = _MAIN
                if dtype != torch.float16:
                    members += _PATHS
                    if layout == "contiguous":
                        members += _COMPONENTS
                        if shape in REFERENCE_SHAPES:
                            members += ((REFERENCE, 4),)
                plan.append(_comparison(shape, layout, dtype, members + _COMPILED))
    for data in ("saturated", "constant"):
        plan.append(_comparison(SHAPES[0], "contiguous", torch.float32, _MAIN[:2], data))
    for shape in LARGE_SHAPES:
        for layout in LAYOUTS:
            for dtype in _DTYPES:
                plan.append(_comparison(shape, layout, dtype, _MAIN))
    return plan


def _comparison(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, members: tuple, data: str = "mixed"
) -> Comparison:
    return Comparison(Case(shape, layout=layout, dtype=dtype, data=data, device="cuda"), members)


class _Mean:
    """The mean of what was seen, and of a first guess, which counts as much as each of that."""

    def __init__(self, guess: float) -> None:
        self._values = [guess]

    def add(self, value: float) -> None:
        self._values.append(value)

    @property
    def value(self) -> float:
        return sum(self._values) / len(self._values)


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

    Compiled providers take most of the time. They are left out of a comparison where, with them, too little would
    remain for the other providers of all comparisons behind it; when that is used up too, so is the rest.
    """
    start = clock()
    found = Measured()
    eager, compiled = _Mean(2.0), _Mean(10.0)  # seconds that a comparison, and its compiled members besides, take
    for number, comparison in enumerate(plan):
        where = label(comparison.case)
        begin = clock()
        remaining = seconds - (begin - start)
        if remaining < eager.value:
            found.left_out.append(f"{where}: all")
            continue
        slow = [member for member in comparison.members if PROVIDERS[member[0]].compiled]
        if slow and remaining - compiled.value < eager.value * (len(plan) - number):
            found.left_out.append(f"{where}: {', '.join(name for name, _ in slow)}")
            comparison = replace(comparison, members=tuple(m for m in comparison.members if m not in slow))
            slow = []
        say(f"{begin - start:4.0f} s, {number + 1} of {len(plan)}: {where}{', with compiled ones' if slow else ''}")
        try:
            with cbn_ext.use_backend("native"):
                measure(comparison, timer, copy_gb_per_s, found)
        except (DeviceLostError, KeyboardInterrupt) as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else "the device failed"
            found.left_out += [f"{label(c.case)}: all, {why}" for c in plan[number:]]
            break
        except Exception as error:  # such as memory that does not suffice for the inputs: the others are measured
            found.failures.append(Failure.of("the inputs", comparison.case, error, ours=False))
        finally:
            found.seconds = clock() - start
            save(found)
        taken = clock() - begin
        if slow:
            compiled.add(taken - eager.value)
        else:
            eager.add(taken)
    return found
