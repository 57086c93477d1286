"""The tables of the CUDA benchmark's summary; every row behind them is in the CSV files."""

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
    ONE_BLOCK,
    OURS,
    OURS_ADD_RELU,
    OURS_RELU,
    REFERENCE,
    REFERENCE_COMPILED,
    STREAMING,
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
    (OURS_RELU, BATCHNORM_RELU, BOTH),
    (OURS_RELU, BATCHNORM_RELU_COMPILED, BOTH),
    (OURS_ADD_RELU, BATCHNORM_ADD_RELU, BOTH),
    (OURS_ADD_RELU, BATCHNORM_ADD_RELU_COMPILED, BOTH),
    (REFERENCE_COMPILED, OURS, BOTH),
    (REFERENCE, OURS, BOTH),
)


Case = tuple[str, str, str]  # shape, dtype, layout


def mean_table(rows: Sequence[CudaRow]) -> Table:
    """Geometric means over the shapes for every dtype and layout."""
    times = Times(rows)
    groups = times.groups()
    body = [
        [f"{name} / {other}, {direction}", *(_number(times.mean(name, other, group, direction)) for group in groups)]
        for name, other, direction in _RELATIONS
    ]
    return Table("Ratios of times: geometric means over the shapes", ("what", *map(" ".join, groups)), [body])


def shape_table(rows: Sequence[CudaRow]) -> Table:
    """Every case: nn.BatchNorm2d's time, ours in its units, and the fused layers in those of what they replace."""
    times = Times(rows)
    header = ("input", "BatchNorm2d, µs", "ours, µs", "forward", "backward", "both", "evaluation", "+ ReLU", "compiled")
    header += ("+ add + ReLU", "compiled", "forward, % of copy", "backward, % of copy")
    pairs = [(OURS, BATCHNORM, direction) for direction in (*DIRECTIONS, EVALUATION)]
    pairs += [(OURS_RELU, other, BOTH) for other in (BATCHNORM_RELU, BATCHNORM_RELU_COMPILED)]
    pairs += [(OURS_ADD_RELU, other, BOTH) for other in (BATCHNORM_ADD_RELU, BATCHNORM_ADD_RELU_COMPILED)]
    return _by_case(
        "Ours (M=4) relative to nn.BatchNorm2d followed by the same operations",
        header,
        times,
        lambda case: [
            _number(times.value(BATCHNORM, 1, case, BOTH), 1),
            _number(times.value(OURS, 4, case, BOTH), 1),
            *(_number(times.ratio(name, other, case, direction)) for name, other, direction in pairs),
            *(_number(times.value(OURS, 4, case, d, "copy_percent"), 0) for d in (FORWARD, BACKWARD)),
        ],
    )


def pass_table(times: Sequence[CudaRow], kernels: Sequence[KernelRow], copy_gb_per_s: float) -> Table:
    """What every pass over memory reaches: by the operator's own choice of path, and in the streaming path."""
    measured = [pass_percents(kernels, provider, copy_gb_per_s) for provider in (OURS, STREAMING)]
    names = [name for name, *_ in PASSES]
    return _by_case(
        "Passes (M=4), % of the copy bandwidth: the path chosen, then the streaming path",
        ("input", *names, *(f"{name}, streaming" for name in names if "chip" not in name)),
        Times(times),
        lambda case: [
            *(_number(measured[0].get((name, *case)), 0) for name in names),
            *(_number(measured[1].get((name, *case)), 0) for name in names if "chip" not in name),
        ],
    )


def cifar_table(rows: Sequence[CudaRow]) -> Table:
    """Microseconds a direction at CIFAR's sizes, with the L2 cache cold and hot."""
    states = [Times(rows, l2) for l2 in ("cold", "hot")]
    shapes = [shape_label(shape) for shape in CIFAR_SHAPES]
    columns = [
        (name, m, direction, index) for name, m in ((OURS, 4), (BATCHNORM, 1)) for direction in DIRECTIONS[:2]
        for index in range(2)
    ]  # fmt: skip
    return _by_case(
        "CIFAR shapes, µs",
        ("input", *(f"{name}, {direction}, {('cold', 'hot')[index]}" for name, _, direction, index in columns)),
        states[0],
        lambda case: [_number(states[index].value(name, m, case, d), 1) for name, m, d, index in columns],
        lambda case: case[0] in shapes,
    )


def path_table(rows: Sequence[CudaRow]) -> Table:
    """Which path should serve which input: the operator's choice beside both of its alternatives."""
    times = Times(rows)
    paths = (OURS, STREAMING, ONE_BLOCK)

    def cells(case: Case) -> list[str]:
        found = []
        for direction in DIRECTIONS[:2]:
            medians = {name: times.value(name, 4, case, direction) for name in paths}
            found += [_number(median, 1) for median in medians.values()]
            found.append(min(paths, key=lambda name: medians[name] or float("inf")))
        return found

    return _by_case(
        "Paths (M=4), µs",
        ("input", *(f"{d}, {name}" for d in DIRECTIONS[:2] for name in (*paths, "fastest"))),
        times,
        cells,
        lambda case: times.value(STREAMING, 4, case, BOTH) is not None,
    )


def component_table(rows: Sequence[CudaRow]) -> Table:
    """Forward+backward by the number of components, relative to nn.BatchNorm2d."""
    times = Times(rows)
    counts = (1, 2, 4, 8)
    return _by_case(
        "Components: forward+backward / BatchNorm2d",
        ("input", *(f"M={m}" for m in counts)),
        times,
        lambda case: [_number(times.value(OURS, m, case, BOTH, "ratio_to_batchnorm")) for m in counts],
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
    for row in rows:
        if row.shape in shapes and row.kernels and row.data == "mixed" and row.direction in (FORWARD, BACKWARD):
            cells = [" ".join((row.shape, row.dtype, row.layout)), row.provider, str(row.M), row.direction]
            sections.setdefault((row.shape, row.dtype, row.layout), []).append(
                [*cells, f"{row.median_us:,.1f}", _number(row.device_us, 1), f"`{row.kernels}`"]
            )
    header = ("input", "provider", "M", "direction", "µs", "of kernels alone", "kernels")
    return Table("Kernels", header, list(sections.values()))


def _by_case(
    title: str,
    header: Sequence[str],
    times: Times,
    cells: Callable[[Case], list[str]],
    wanted: Callable[[Case], bool] = lambda case: True,
) -> Table:
    """A row for each wanted case, a section for each dtype and layout."""
    sections: dict[tuple[str, str], list[list[str]]] = {}
    for case in filter(wanted, times.cases()):
        sections.setdefault(case[1:], []).append([" ".join(case), *cells(case)])
    return Table(title, header, list(sections.values()))


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
