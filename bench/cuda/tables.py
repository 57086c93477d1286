"""What the CUDA benchmark's rows come to: ratios as geometric means over the shapes, targets, and the tables."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, geometric_mean

from bench.cases import ADD_RELU, RELU, shape_label
from bench.cuda.measure import CudaRow, KernelRow
from bench.cuda.plan import CIFAR_SHAPES, EAGER, LARGE_SHAPES, RESNET50_SHAPES
from bench.harness import BACKWARD, BOTH, DIRECTIONS, EVALUATION, FORWARD, MemoryRow
from bench.providers import BATCHNORM, COMPILED, JOINT, OURS, REFERENCE, SPLIT
from bench.report import Table, Target, number

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

#: What ours is set in relation to: nn.BatchNorm2d followed by the same operations, eager and compiled.
_FUSED = tuple((OURS + op, BATCHNORM + op + how, BOTH) for op in (RELU, ADD_RELU) for how in ("", COMPILED))
RELATIONS = (
    *((OURS, BATCHNORM, direction) for direction in (*DIRECTIONS, EVALUATION)),
    (OURS, BATCHNORM + COMPILED, BOTH),
    *((OURS + mode, BATCHNORM, direction) for mode in (SPLIT, JOINT) for direction in DIRECTIONS),
    *_FUSED,
    (REFERENCE + COMPILED, OURS, BOTH),
    (REFERENCE, OURS, BOTH),
)

Case = tuple[str, str, str]  # shape, dtype, layout


class Times:
    """The rows with mixed data, of what several phases measured the first, and means of ratios over the shapes.

    Both times of a ratio are of one phase, where they were taken side by side.
    """

    def __init__(self, rows: Iterable[CudaRow], l2: str = "cold") -> None:
        self.rows: dict[tuple, CudaRow] = {}
        self._phases: dict[tuple, dict[str, float]] = defaultdict(dict)
        for row in rows:
            if (row.data, row.l2) == ("mixed", l2):
                key = (*row.member, *row.case, row.direction)
                self.rows.setdefault(key, row)
                self._phases[key][row.phase] = row.median_us
        self.cases = list(dict.fromkeys(row.case for row in self.rows.values()))
        #: By (dtype, layout), the cases of all shapes.
        self.groups = {
            group: [c for c in self.cases if c[1:] == group] for group in dict.fromkeys(c[1:] for c in self.cases)
        }

    def value(self, name: str, components: int, case: Case, direction: str, column: str = "median_us") -> float | None:
        """A column of a row, None where there is no such row."""
        row = self.rows.get((name, components, *case, direction))
        return None if row is None else getattr(row, column)

    def ratio(self, name: str, other: str, case: Case, direction: str) -> float | None:
        """`name`'s time in units of `other`'s, with four components where they have components."""
        ones, units = (
            self._phases.get((each, 1 if each.startswith(BATCHNORM) else 4, *case, direction), {})
            for each in (name, other)
        )
        return next((median / units[phase] for phase, median in ones.items() if phase in units), None)

    def mean(self, name: str, other: str, cases: Iterable[Case], direction: str = BOTH) -> float | None:
        """The geometric mean of `ratio` over those of the cases that both have, None where there are none."""
        ratios = [self.ratio(name, other, case, direction) for case in cases]
        ratios = [ratio for ratio in ratios if ratio is not None]
        return geometric_mean(ratios) if ratios else None

    def worst(
        self, name: str, other: str, dtypes: Sequence[str] = DTYPES, direction: str = BOTH, best: Callable = max
    ) -> float | None:
        """The worst `mean` over the shapes of these dtypes and every layout."""
        groups = (cases for (dtype, _), cases in self.groups.items() if dtype in dtypes)
        means = [self.mean(name, other, cases, direction) for cases in groups]
        return best((mean for mean in means if mean is not None), default=None)


def pass_percents(kernels: Iterable[KernelRow], copy_gb_per_s: float) -> dict[tuple[str, ...], float]:
    """(pass, shape, dtype, layout) to the percentage of the copy bandwidth at which the pass moves its tensors."""
    return {
        (name, *row.case): tensors * tensor_bytes(row) / row.device_us / 10 / copy_gb_per_s
        for row in kernels
        if row.member == (OURS, 4) and row.data == "mixed"
        for name, tensors, direction, start in PASSES
        if row.direction == direction and row.kernel.startswith(start)
    }


def tensor_bytes(row: KernelRow | MemoryRow) -> int:
    """Size of the input of a row."""
    size = 4 if row.dtype == "float32" else 2
    for length in row.shape.split("x"):
        size *= int(length)
    return size


def targets(
    times: Sequence[CudaRow], memory: Sequence[MemoryRow], kernels: Sequence[KernelRow], copy_gb_per_s: float
) -> list[Target]:
    """What is to be reached beside what is, four components; of several dtypes and layouts the worst."""
    cold = Times(times)
    compiled = REFERENCE + COMPILED
    found = []
    for ours in (OURS, OURS + JOINT):
        found += [
            Target(f"{BOTH}, {ours} / {BATCHNORM}, float32", cold.worst(ours, BATCHNORM, DTYPES[:1]), "≤", 1.0),
            Target(f"{BOTH}, {ours} / {BATCHNORM}, 16-bit", cold.worst(ours, BATCHNORM, DTYPES[1:]), "≤", 1.15),
        ]
    for ours, peer, direction in _FUSED:
        limit = 1.0 if peer.endswith(COMPILED) else 0.8
        found.append(Target(f"{direction}, {ours} / {peer}", cold.worst(ours, peer), "≤", limit))
    found.append(Target(f"{BOTH}, {compiled} / {OURS}", cold.worst(compiled, OURS, best=min), "≥", 5))
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
            rows = Times(times, l2).rows.values()
            ours = (row for row in rows if (*row.member, row.direction) == (OURS, 4, direction))
            value = max((row.median_us for row in ours if row.shape in _CIFAR), default=None)
            found.append(Target(f"µs, {direction}, slowest CIFAR shape, dtype and layout, L2 {l2}", value, "≤", 6))

    for what, size in (
        ("beyond input and output", lambda row: row.beyond),
        ("in all", lambda row: row.in_out + row.beyond),
    ):
        units = {row.label: size(row) for row in memory if row.provider == BATCHNORM}
        ours = (row for row in memory if row.member == (OURS, 4) and row.label in units)
        value = max((size(row) / max(1, units[row.label]) for row in ours), default=None)
        found.append(Target(f"peak memory {what}, {OURS} / {BATCHNORM}, worst case", value, "≤", 1.0))
    return found


def worst_table(rows: Sequence[CudaRow], count: int = 10) -> Table:
    """Where to begin: the cases in which ours takes the longest in units of nn.BatchNorm2d."""
    ours = (row for row in Times(rows).rows.values() if (*row.member, row.direction) == (OURS, 4, BOTH))
    worst = sorted((row for row in ours if row.ratio_to_batchnorm), key=lambda row: -row.ratio_to_batchnorm)[:count]
    body = [
        [
            *(row.label, number(row.median_us, 1), number(row.ratio_to_batchnorm), number(row.copy_percent, 0)),
            short_kernels(row),
        ]
        for row in worst
    ]
    header = ("input", "µs", "ratio", "% of copy", "kernels")
    return Table(f"Highest ratios to {BATCHNORM} (M=4, {BOTH}, L2 cold)", header, [body])


def short_kernels(row: CudaRow) -> str:
    """The names of a row's kernels, ours by what they do."""
    return re.sub(r"cbn::(\w+?)(_kernel)?(<[^;]*>)?(?=;|$)", r"\1", row.kernels)


def eager_table(rows: Sequence[CudaRow]) -> Table:
    """What a small layer's step takes without a graph, most of it the host's time."""
    body = [
        [row.shape, row.provider, str(row.M), number(row.median_us, 1), number(row.ratio_to_batchnorm)]
        for row in Times(rows, EAGER).rows.values()
    ]
    return Table(f"Eager steps, {BOTH}, by the wall clock", ("input", "provider", "M", "µs", "ratio"), [body])


def mean_table(times: Times) -> Table:
    """Geometric means over the shapes for every dtype and layout."""
    body = [
        [f"{name} / {other}, {d}", *(number(times.mean(name, other, cases, d)) for cases in times.groups.values())]
        for name, other, d in RELATIONS
    ]
    header = ("what", *map(" ".join, times.groups))
    return Table("Ratios of times: geometric means over the shapes", header, [body])


def shape_table(times: Times) -> Table:
    """Every case: nn.BatchNorm2d's time, ours in its units, and the other modes in those of what they replace."""
    header = ("input", "BatchNorm2d, µs", "ours, µs", "forward", "backward", "both", "evaluation", "split", "joint")
    header += ("+ ReLU", "compiled", "+ add + ReLU", "compiled", "forward, % of copy", "backward, % of copy")
    pairs = [*RELATIONS[:4], (OURS + SPLIT, BATCHNORM, BOTH), (OURS + JOINT, BATCHNORM, BOTH), *_FUSED]
    return by_case(
        "Ours (M=4) relative to nn.BatchNorm2d followed by the same operations",
        header,
        times,
        lambda case: [
            number(times.value(BATCHNORM, 1, case, BOTH), 1),
            number(times.value(OURS, 4, case, BOTH), 1),
            *(number(times.ratio(name, other, case, direction)) for name, other, direction in pairs),
            *(number(times.value(OURS, 4, case, d, "copy_percent"), 0) for d in (FORWARD, BACKWARD)),
        ],
    )


def pass_table(times: Times, kernels: Sequence[KernelRow], copy_gb_per_s: float) -> Table:
    """What every pass over memory reaches."""
    measured = pass_percents(kernels, copy_gb_per_s)
    names = [name for name, *_ in PASSES]
    return by_case(
        "Passes (M=4), % of the copy bandwidth",
        ("input", *names),
        times,
        lambda case: [number(measured.get((name, *case)), 0) for name in names],
    )


def cifar_table(rows: Sequence[CudaRow]) -> Table:
    """Microseconds a direction at CIFAR's sizes, with the L2 cache cold and hot."""
    states = {l2: Times(rows, l2) for l2 in ("cold", "hot")}
    columns = [
        (*member, direction, l2) for member in ((OURS, 4), (BATCHNORM, 1)) for direction in (FORWARD, BACKWARD)
        for l2 in states
    ]  # fmt: skip
    return by_case(
        "CIFAR shapes, µs",
        ("input", *(f"{name}, {direction}, {l2}" for name, _, direction, l2 in columns)),
        states["cold"],
        lambda case: [number(states[l2].value(name, m, case, d), 1) for name, m, d, l2 in columns],
        lambda case: case[0] in _CIFAR,
    )


def component_table(times: Times) -> Table:
    """Forward+backward by the number of components, relative to nn.BatchNorm2d."""
    counts = (1, 2, 4, 8)
    return by_case(
        "Components: forward+backward / BatchNorm2d",
        ("input", *(f"M={m}" for m in counts)),
        times,
        lambda case: [number(times.value(OURS, m, case, BOTH, "ratio_to_batchnorm")) for m in counts],
        lambda case: times.value(OURS, 8, case, BOTH) is not None,
    )


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """Peak memory of a step, beside its input and output, in tensors of the input's size."""
    beyond: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        beyond[row.member].append(row.beyond / tensor_bytes(row))
    body = [
        [name, str(m), f"{fmean(each):.3f}", f"{max(each):.3f}", str(len(each))] for (name, m), each in beyond.items()
    ]
    title = "Peak memory of one forward+backward beyond input and output, in tensors of the input's size"
    return Table(title, ("provider", "M", "mean", "largest", "cases"), [body])


def kernel_table(times: Times, shapes: Sequence[str]) -> Table:
    """What ran on the device at some shapes; in the CSV file at all of them."""
    sections: dict[Case, list[list[str]]] = defaultdict(list)
    for row in times.rows.values():
        if row.shape in shapes and row.kernels and row.direction in (FORWARD, BACKWARD):
            durations = number(row.median_us, 1), number(row.device_us, 1)
            cells = [row.label, row.provider, str(row.M), row.direction, *durations, f"`{row.kernels}`"]
            sections[row.case].append(cells)
    header = ("input", "provider", "M", "direction", "µs", "of kernels alone", "kernels")
    return Table("Kernels", header, list(sections.values()))


def by_case(
    title: str,
    header: Sequence[str],
    times: Times,
    cells: Callable[[Case], list[str]],
    wanted: Callable[[Case], bool] = lambda case: True,
) -> Table:
    """A row for each wanted case, its name and its cells; a section for each dtype and layout."""
    sections: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    for case in filter(wanted, times.cases):
        sections[case[1:]].append([" ".join(case), *cells(case)])
    return Table(title, header, list(sections.values()))
