"""How fast are the layers on a GPU? Inputs of CIFAR and ImageNet ResNets, in graph replay, within a time budget."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

import cbn_ext
from bench.compare import Comparison
from bench.cuda_compare import DeviceLostError, Measured, Timer, label, measure
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
CIFAR_SHAPES = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8))
_RESNET50 = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
RESNET50_SHAPES, LARGE_SHAPES = (tuple((n, c, size, size) for c, size in _RESNET50) for n in (64, 256))
#: The eager reference takes dozens of times the others' time and memory: it is measured here only.
REFERENCE_SHAPES = (CIFAR_SHAPES[1], RESNET50_SHAPES[2], RESNET50_SHAPES[5])

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
    """All that is to be compared, the most important first: the last ones are left out when time runs short."""
    small = CIFAR_SHAPES + RESNET50_SHAPES

    def some(
        shapes: Sequence[tuple[int, ...]], layout: str, dtype: torch.dtype, members: tuple, data: str = "mixed"
    ) -> list[Comparison]:
        return [Comparison(Case(s, layout=layout, dtype=dtype, data=data, device="cuda"), members) for s in shapes]

    plan = []
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            components = _COMPONENTS if layout == "contiguous" else ()
            for comparison in some(small, layout, dtype, _MAIN + _PATHS + components + _COMPILED):
                wanted = layout == "contiguous" and comparison.case.shape in REFERENCE_SHAPES
                plan.append(replace(comparison, members=comparison.members + ((REFERENCE, 4),) * wanted))
        plan += some(small, layout, torch.float16, _MAIN + _COMPILED)
    for data in ("saturated", "constant"):
        plan += some(RESNET50_SHAPES[2:3], "contiguous", torch.float32, _MAIN[:2], data)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in LAYOUTS:
            plan += some(LARGE_SHAPES, layout, dtype, _MAIN)
    return plan


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
        finally:
            found.seconds = clock() - start
            save(found)
        taken = clock() - begin
        if slow:
            compiled.add(taken - eager.value)
        else:
            eager.add(taken)
    return found
