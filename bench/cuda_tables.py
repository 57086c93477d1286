"""The tables of the CUDA benchmark's summary; every row behind them is in the CSV files."""

import re
from collections.abc import Callable, Sequence
from statistics import fmean

from bench.cuda import CIFAR_SHAPES
from bench.cuda_compare import CudaRow, KernelRow
from bench.cuda_targets import PASSES, Times, pass_percents, tensor_bytes
from bench.harness import BACKWARD, BOTH, DIRECTIONS, EVALUATION, FORWARD, MemoryRow
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
    REFERENCE,
    REFERENCE_COMPILED,
    shape_label,
)
from bench.report import Table

#: What is set in relation to what, in which direction.
_RELATIONS = (
    (OURS, BATCHNORM, FORWARD),
    (OURS, BATCHNORM, BACKWARD),
    (OURS, BATCHNORM, BOTH),
    (OURS, BATCHNORM, EVALUATION),
    (OURS, BATCHNORM_COMPILED, BOTH),
    (OURS_SPLIT, BATCHNORM, FORWARD),
    (OURS_SPLIT, BATCHNORM, BACKWARD),
    (OURS_SPLIT, BATCHNORM, BOTH),
    (OURS_RELU, BATCHNORM_RELU, BOTH),
    (OURS_RELU, BATCHNORM_RELU_COMPILED, BOTH),
    (OURS_ADD_RELU, BATCHNORM_ADD_RELU, BOTH),
    (OURS_ADD_RELU, BATCHNORM_ADD_RELU_COMPILED, BOTH),
    (REFERENCE_COMPILED, OURS, BOTH),
    (REFERENCE, OURS, BOTH),
)


Case = tuple[str, str, str]  # shape, dtype, layout


def worst_table(rows: Sequence[CudaRow], count: int = 10) -> Table:
    """Where to begin: the cases in which ours takes the longest in units of nn.BatchNorm2d."""
    ours = [
        row for (name, m, *_, direction), row in Times(rows).rows.items() if (name, m, direction) == (OURS, 4, BOTH)
    ]
    worst = sorted((row for row in ours if row.ratio_to_batchnorm), key=lambda row: -row.ratio_to_batchnorm)[:count]
    return Table(
        f"Highest ratios to {BATCHNORM} (M=4, {BOTH}, L2 cold)",
        ("input", "µs", "ratio", "% of copy", "kernels"),
        [
            [
                [
                    " ".join((row.shape, row.dtype, row.layout)),
                    number(row.median_us, 1),
                    number(row.ratio_to_batchnorm),
                    number(row.copy_percent, 0),
                    short_kernels(row),
                ]
                for row in worst
            ]
        ],
    )


def short_kernels(row: CudaRow) -> str:
    """The names of a row's kernels, ours by what they do."""
    return re.sub(r"cbn::(\w+?)(_kernel)?(<[^;]*>)?(?=;|$)", r"\1", row.kernels)


def eager_table(rows: Sequence[CudaRow]) -> Table:
    """What a small layer's step takes without a graph, most of it the host's time."""
    body = [
        [row.shape, row.provider, str(row.M), number(row.median_us, 1), number(row.ratio_to_batchnorm)]
        for row in Times(rows, "eager").rows.values()
    ]
    return Table(f"Eager steps, {BOTH}, by the wall clock", ("input", "provider", "M", "µs", "ratio"), [body])


def mean_table(rows: Sequence[CudaRow]) -> Table:
    """Geometric means over the shapes for every dtype and layout."""
    times = Times(rows)
    groups = times.groups()
    body = [
        [f"{name} / {other}, {direction}", *(number(times.mean(name, other, group, direction)) for group in groups)]
        for name, other, direction in _RELATIONS
    ]
    return Table("Ratios of times: geometric means over the shapes", ("what", *map(" ".join, groups)), [body])


def shape_table(rows: Sequence[CudaRow]) -> Table:
    """Every case: nn.BatchNorm2d's time, ours in its units, and the fused layers in those of what they replace."""
    times = Times(rows)
    header = ("input", "BatchNorm2d, µs", "ours, µs", "forward", "backward", "both", "evaluation", "split")
    header += ("+ ReLU", "compiled", "+ add + ReLU", "compiled", "forward, % of copy", "backward, % of copy")
    pairs = [(OURS, BATCHNORM, direction) for direction in (*DIRECTIONS, EVALUATION)]
    pairs.append((OURS_SPLIT, BATCHNORM, BOTH))
    pairs += [(OURS_RELU, other, BOTH) for other in (BATCHNORM_RELU, BATCHNORM_RELU_COMPILED)]
    pairs += [(OURS_ADD_RELU, other, BOTH) for other in (BATCHNORM_ADD_RELU, BATCHNORM_ADD_RELU_COMPILED)]
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


def pass_table(times: Sequence[CudaRow], kernels: Sequence[KernelRow], copy_gb_per_s: float) -> Table:
    """What every pass over memory reaches."""
    measured = pass_percents(kernels, copy_gb_per_s)
    names = [name for name, *_ in PASSES]
    return by_case(
        "Passes (M=4), % of the copy bandwidth",
        ("input", *names),
        Times(times),
        lambda case: [number(measured.get((name, *case)), 0) for name in names],
    )


def cifar_table(rows: Sequence[CudaRow]) -> Table:
    """Microseconds a direction at CIFAR's sizes, with the L2 cache cold and hot."""
    states = [Times(rows, l2) for l2 in ("cold", "hot")]
    shapes = [shape_label(shape) for shape in CIFAR_SHAPES]
    columns = [
        (name, m, direction, index) for name, m in ((OURS, 4), (BATCHNORM, 1)) for direction in DIRECTIONS[:2]
        for index in range(2)
    ]  # fmt: skip
    return by_case(
        "CIFAR shapes, µs",
        ("input", *(f"{name}, {direction}, {('cold', 'hot')[index]}" for name, _, direction, index in columns)),
        states[0],
        lambda case: [number(states[index].value(name, m, case, d), 1) for name, m, d, index in columns],
        lambda case: case[0] in shapes,
    )


def component_table(rows: Sequence[CudaRow]) -> Table:
    """Forward+backward by the number of components, relative to nn.BatchNorm2d."""
    times = Times(rows)
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
    beyond: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        beyond.setdefault((row.provider, row.M), []).append(row.beyond / tensor_bytes(row.shape, row.dtype))
    body = [
        [name, str(m), f"{fmean(each):.3f}", f"{max(each):.3f}", str(len(each))] for (name, m), each in beyond.items()
    ]
    title = "Peak memory of one forward+backward beyond input and output, in tensors of the input's size"
    return Table(title, ("provider", "M", "mean", "largest", "cases"), [body])


def kernel_table(rows: Sequence[CudaRow], shapes: Sequence[str]) -> Table:
    """What ran on the device at some shapes; in the CSV file at all of them."""
    sections: dict[Case, list[list[str]]] = {}
    for row in Times(rows).rows.values():
        if row.shape in shapes and row.kernels and row.direction in (FORWARD, BACKWARD):
            cells = [" ".join((row.shape, row.dtype, row.layout)), row.provider, str(row.M), row.direction]
            sections.setdefault((row.shape, row.dtype, row.layout), []).append(
                [*cells, f"{row.median_us:,.1f}", number(row.device_us, 1), f"`{row.kernels}`"]
            )
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
    sections: dict[tuple[str, str], list[list[str]]] = {}
    for case in filter(wanted, times.cases()):
        sections.setdefault(case[1:], []).append([" ".join(case), *cells(case)])
    return Table(title, header, list(sections.values()))


def number(value: float | None, digits: int = 2) -> str:
    """A cell, empty for what was not measured."""
    return "" if value is None else f"{value:,.{digits}f}"
