"""What the CUDA kernels are to reach, computed from the rows of a benchmark: geometric means over the shapes."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean

from bench.cuda import CIFAR_SHAPES, LARGE_SHAPES, RESNET50_SHAPES
from bench.cuda_compare import CudaRow, KernelRow
from bench.harness import BACKWARD, BOTH, EVALUATION, FORWARD, MemoryRow
from bench.providers import (
    BATCHNORM,
    BATCHNORM_ADD_RELU,
    BATCHNORM_ADD_RELU_COMPILED,
    BATCHNORM_RELU,
    BATCHNORM_RELU_COMPILED,
    OURS,
    OURS_ADD_RELU,
    OURS_RELU,
    REFERENCE_COMPILED,
    shape_label,
)
from bench.report import Target

DTYPES = ("float32", "bfloat16", "float16")
_CIFAR = [shape_label(shape) for shape in CIFAR_SHAPES]
_RESNET50 = [shape_label(shape) for shape in RESNET50_SHAPES + LARGE_SHAPES]

#: Name, tensors like x that it moves, direction, and how the kernel's name starts.
PASSES = (
    ("statistics", 1, FORWARD, "cbn::reduce_kernel"),
    ("normalise", 2, FORWARD, "cbn::map_kernel"),
    ("forward on chip", 2, FORWARD, "cbn::resident_kernel"),
    ("backward reduction", 2, BACKWARD, "cbn::reduce_kernel"),
    ("input gradient", 3, BACKWARD, "cbn::map_kernel"),
    ("backward on chip", 3, BACKWARD, "cbn::resident_kernel"),
)


class Times:
    """The rows with mixed data, of what several phases measured the first, and means of ratios over the shapes.

    Both times of a ratio are of one phase, where they were taken side by side.
    """

    def __init__(self, rows: Iterable[CudaRow], l2: str = "cold") -> None:
        self.rows: dict[tuple, CudaRow] = {}
        self._phases: dict[tuple, dict[str, float]] = defaultdict(dict)
        for row in rows:
            if (row.data, row.l2) == ("mixed", l2):
                key = (row.provider, row.M, row.shape, row.dtype, row.layout, row.direction)
                self.rows.setdefault(key, row)
                self._phases[key][row.phase] = row.median_us

    def cases(self) -> list[tuple[str, str, str]]:
        """Every (shape, dtype, layout) that was measured."""
        return list(dict.fromkeys(key[2:5] for key in self.rows))

    def groups(self) -> list[tuple[str, str]]:
        """Every (dtype, layout) that was measured."""
        return list(dict.fromkeys(case[1:] for case in self.cases()))

    def value(
        self, name: str, components: int, case: tuple[str, str, str], direction: str, column: str = "median_us"
    ) -> float | None:
        """A column of a row, None where there is no such row."""
        row = self.rows.get((name, components, *case, direction))
        return None if row is None else getattr(row, column)

    def ratio(self, name: str, other: str, case: tuple[str, str, str], direction: str) -> float | None:
        """`name`'s time in units of `other`'s, with four components where they have components."""
        ones, units = (self._phases.get((each, _components(each), *case, direction), {}) for each in (name, other))
        return next((median / units[phase] for phase, median in ones.items() if phase in units), None)

    def mean(self, name: str, other: str, group: tuple[str, str], direction: str = BOTH) -> float | None:
        """The geometric mean of `ratio` over the shapes of a (dtype, layout), None where there are none."""
        ratios = [self.ratio(name, other, case, direction) for case in self.cases() if case[1:] == group]
        ratios = [ratio for ratio in ratios if ratio is not None]
        return geometric_mean(ratios) if ratios else None

    def worst(
        self, name: str, other: str, dtypes: Sequence[str] = DTYPES, direction: str = BOTH, best: Callable = max
    ) -> float | None:
        """The worst `mean` over dtypes and layouts."""
        means = [self.mean(name, other, group, direction) for group in self.groups() if group[0] in dtypes]
        return best((mean for mean in means if mean is not None), default=None)


def _components(provider: str) -> int:
    return 1 if provider.startswith("BatchNorm2d") else 4


def pass_percents(kernels: Iterable[KernelRow], copy_gb_per_s: float) -> dict[tuple[str, ...], float]:
    """(pass, shape, dtype, layout) to the percentage of the copy bandwidth at which the pass moves its tensors."""
    percents = {}
    for row in kernels:
        if (row.provider, row.M, row.data) != (OURS, 4, "mixed"):
            continue
        for name, tensors, direction, start in PASSES:
            if row.direction == direction and row.kernel.startswith(start):
                moved = tensors * tensor_bytes(row.shape, row.dtype)
                percents[name, row.shape, row.dtype, row.layout] = moved / row.device_us / 10 / copy_gb_per_s
    return percents


def tensor_bytes(shape: str, dtype: str) -> int:
    """Size of the input of a row."""
    size = 4 if dtype == "float32" else 2
    for length in shape.split("x"):
        size *= int(length)
    return size


def targets(
    times: Sequence[CudaRow], memory: Sequence[MemoryRow], kernels: Sequence[KernelRow], copy_gb_per_s: float
) -> list[Target]:
    """What is to be reached beside what is, four components; of several dtypes and layouts the worst."""
    cold = Times(times)
    found = [
        Target(f"{BOTH}, {OURS} / {BATCHNORM}, float32", cold.worst(OURS, BATCHNORM, DTYPES[:1]), "≤", 1.0),
        Target(f"{BOTH}, {OURS} / {BATCHNORM}, 16-bit", cold.worst(OURS, BATCHNORM, DTYPES[1:]), "≤", 1.15),
    ]
    for ours, eager, compiled in (
        (OURS_RELU, BATCHNORM_RELU, BATCHNORM_RELU_COMPILED),
        (OURS_ADD_RELU, BATCHNORM_ADD_RELU, BATCHNORM_ADD_RELU_COMPILED),
    ):
        for peer, limit in ((eager, 0.8), (compiled, 1.0)):
            found.append(Target(f"{BOTH}, {ours} / {peer}", cold.worst(ours, peer), "≤", limit))
    value = cold.worst(REFERENCE_COMPILED, OURS, best=min)
    found.append(Target(f"{BOTH}, {REFERENCE_COMPILED} / {OURS}", value, "≥", 5))
    value = cold.worst(OURS, BATCHNORM, direction=EVALUATION)
    found.append(Target(f"{EVALUATION}, {OURS} / {BATCHNORM}", value, "≤", 1.1))

    percents = pass_percents(kernels, copy_gb_per_s)
    for name in dict.fromkeys(name for name, *_ in percents):
        by_layout = defaultdict(list)
        for (of, shape, dtype, layout), percent in percents.items():
            if (of, dtype) == (name, "float32") and shape in _RESNET50:
                by_layout[layout].append(percent)
        value = min(map(geometric_mean, by_layout.values()), default=None)
        found.append(Target(f"% of copy bandwidth, {name}, ResNet-50 shapes, float32", value, "≥", 80))

    for direction in (FORWARD, BACKWARD):
        for l2 in ("cold", "hot"):
            medians = [
                row.median_us
                for row in Times(times, l2).rows.values()
                if (row.provider, row.M, row.direction) == (OURS, 4, direction) and row.shape in _CIFAR
            ]
            value = max(medians, default=None)
            found.append(Target(f"µs, {direction}, slowest CIFAR shape, dtype and layout, L2 {l2}", value, "≤", 6))

    for what, size in (
        ("beyond input and output", lambda row: row.beyond),
        ("in all", lambda row: row.in_out + row.beyond),
    ):
        units = {_case(row): size(row) for row in memory if row.provider == BATCHNORM}
        ours = [row for row in memory if (row.provider, row.M) == (OURS, 4) and _case(row) in units]
        value = max((size(row) / max(1, units[_case(row)]) for row in ours), default=None)
        found.append(Target(f"peak memory {what}, {OURS} / {BATCHNORM}, worst case", value, "≤", 1.0))
    return found


def _case(row: MemoryRow) -> tuple[str, ...]:
    return row.shape, row.dtype, row.layout, row.data
