"""What the CUDA benchmark makes of its rows: means, passes, targets, tables and files."""

import csv
import os
from dataclasses import replace
from itertools import product

import pytest

from bench.cases import ADD_RELU, RELU
from bench.cuda import plan, report, tables
from bench.cuda.measure import CudaRow, KernelRow, Measured
from bench.cuda.tables import Times, pass_percents, targets
from bench.harness import BACKWARD, BOTH, DIRECTIONS, EVALUATION, FORWARD, MemoryRow
from bench.providers import BATCHNORM, COMPILED, JOINT, OURS, REFERENCE
from bench.report import report_name, write_csvs

COPY = 4000.0  # GB/s
ENVIRONMENT = {
    "device": "Some GPU 9", "driver": "555.1", "cuda": "13.0", "cudnn": 91000,
    "torch": "2.11.0", "cbn_ext": "0.1.0", "date": "2026-01-31", "copy_gb_per_s": COPY,
}  # fmt: skip


def cuda_row(**changes) -> CudaRow:
    row = CudaRow(
        OURS, "64x256x56x56", "float32", "contiguous", 4, "mixed", BOTH,
        20.0, 18.0, 25.0, 7, 1500.0, 2.0, "plain", "cold", 37.5, 19.0, "k",
    )  # fmt: skip
    return replace(row, **changes)


def rows_of(medians: dict[str, float], **changes) -> list[CudaRow]:
    return [
        cuda_row(
            provider=name,
            M=1 if name.startswith("BatchNorm2d") else 4,
            median_us=median,
            p20_us=0.9 * median,
            p80_us=1.2 * median,
            **changes,
        )
        for name, median in medians.items()
    ]


def test_means_are_geometric_over_the_shapes_that_both_have():
    rows = rows_of({OURS: 10.0, BATCHNORM: 10.0})
    rows += rows_of({OURS: 40.0, BATCHNORM: 10.0}, shape="64x64x56x56")
    rows += rows_of({OURS: 99.0}, shape="64x512x28x28")
    rows += rows_of({OURS: 99.0, BATCHNORM: 1.0}, data="saturated", shape="1x1x1x1")
    rows += rows_of({OURS: 99.0, BATCHNORM: 1.0}, l2="hot", shape="1x1x1x2")
    rows += [cuda_row(M=8, median_us=999.0)]
    times = Times(rows)
    cases = times.groups["float32", "contiguous"]
    assert times.mean(OURS, BATCHNORM, cases) == pytest.approx(2.0)
    assert times.mean(OURS, BATCHNORM, cases, FORWARD) is None
    assert times.worst(OURS, BATCHNORM) == pytest.approx(2.0)
    hot = Times(rows, "hot")
    assert hot.mean(OURS, BATCHNORM, hot.cases) == pytest.approx(99.0)


def test_ratios_are_of_one_phase_and_other_figures_of_the_first():
    rows = rows_of({OURS: 10.0, BATCHNORM: 5.0})
    rows += rows_of({OURS: 30.0, BATCHNORM: 7.0, REFERENCE + COMPILED: 90.0}, phase="reference")
    times, case = Times(rows), ("64x256x56x56", "float32", "contiguous")
    assert times.ratio(OURS, BATCHNORM, case, BOTH) == pytest.approx(2.0)
    assert times.ratio(REFERENCE + COMPILED, OURS, case, BOTH) == pytest.approx(3.0)
    assert times.value(BATCHNORM, 1, case, BOTH) == 5.0
    assert times.mean(OURS, BATCHNORM, [case]) == pytest.approx(2.0)
    rows = rows_of({BATCHNORM + RELU: 10.0}) + rows_of({OURS + RELU: 10.0}, phase="fused")
    assert Times(rows).ratio(OURS + RELU, BATCHNORM + RELU, case, BOTH) is None


def test_the_worst_cases_stand_in_their_order_with_short_kernels():
    rows = []
    for number in range(12):
        ratio = float(number * 7 % 12)  # in no order
        rows += rows_of({OURS: 10 * ratio}, shape=f"1x{number}x1x1", ratio_to_batchnorm=ratio)
    kernels = [name for name, direction, _ in KERNELS if direction == FORWARD]
    rows[1] = replace(rows[1], kernels=f"{kernels[0]}; 2 {kernels[2]}; {kernels[1]}; cbn::prepare_kernel; add_kernel")
    others = {"direction": FORWARD}, {"l2": "hot"}, {"M": 1}, {"provider": OURS + RELU}, {"data": "constant"}
    rows += [cuda_row(ratio_to_batchnorm=99.0, shape="9x9", **changes) for changes in others]
    rows += [cuda_row(ratio_to_batchnorm=None, shape="8x8"), replace(rows[1], phase="again", ratio_to_batchnorm=50.0)]
    (section,) = tables.worst_table(rows).sections
    assert [row[2] for row in section] == [f"{n:.2f}" for n in range(11, 1, -1)]
    (row,) = (row for row in section if row[0] == "1x1x1x1 float32 contiguous")
    assert row[1:] == ["70.0", "7.00", "38", "reduce; 2 finish; map; prepare; add_kernel"]


def test_eager_steps_have_a_table_of_their_own():
    rows = rows_of({OURS: 300.0, BATCHNORM: 60.0}, l2="eager", phase="eager", shape="8x16x8x8", ratio_to_batchnorm=5.0)
    (section,) = tables.eager_table(rows + rows_of({OURS: 9.0})).sections
    assert section == [["8x16x8x8", OURS, "4", "300.0", "5.00"], ["8x16x8x8", BATCHNORM, "1", "60.0", "5.00"]]


def test_the_sweep_names_the_fastest_setting_of_either_path():
    streaming = {"cbn_ext cluster=0 blocks=4": 20.0, "cbn_ext cluster=0 blocks=8": 12.0}
    resident = {"cbn_ext cluster=8 threads=256": 16.0, "cbn_ext cluster=1 threads=256": 18.0}
    rows = []
    for layout, unit in (("contiguous", 1.0), ("channels_last", 4.0)):
        case = {"layout": layout, "direction": BACKWARD, "phase": "sweep"}
        rows += rows_of(
            {OURS: 15.0 * unit, BATCHNORM: 10.0}, kernels="cbn::reduce_kernel<a>; cbn::map_kernel<b>", **case
        )
        rows += rows_of(streaming, kernels="cbn::reduce_kernel<a>; cbn::map_kernel<b>", **case)
        rows += rows_of(resident, kernels="cbn::resident_kernel<a>", **case)
    swept = report.make_report(ENVIRONMENT, Measured(times=rows, left_out={"sweep": ["somewhere"]}), swept=True)
    settings, forward, backward = swept.tables
    shared = ["reduce; map", "12.0", "cbn_ext cluster=0 blocks=8", "16.0", "cbn_ext cluster=8 threads=256"]
    assert backward.sections == [
        [["64x256x56x56 float32 contiguous", "10.0", "15.0", *shared, "1.25"]],
        [["64x256x56x56 float32 channels_last", "10.0", "60.0", *shared, "5.00"]],
    ]
    groups = [f"{layout}, {d}" for layout in ("contiguous", "channels_last") for d in (FORWARD, BACKWARD)]
    assert list(settings.header) == ["setting", *groups]
    assert ["cbn_ext cluster=0 blocks=8", "", "0.80", "", "0.20"] in settings.sections[0]
    assert ["cbn_ext cluster=0 blocks=16", "", "", "", ""] in settings.sections[0]
    assert swept.warnings == ["Left out of sweep, the time was over (1): somewhere"]
    markdown = forward.markdown()
    assert "| 64x256x56x56 float32 contiguous |  |  |  |  |  |  |  |  |" in markdown


KERNELS = [
    ("cbn::reduce_kernel<cbn::Config<float, 4, false>, (cbn::Pass)0>", FORWARD, 100.0),
    ("cbn::map_kernel<cbn::Config<float, 4, false>, (cbn::Pass)1>", FORWARD, 125.0),
    ("cbn::reduce_kernel<cbn::Config<float, 4, false>, (cbn::Pass)2>", BACKWARD, 100.0),
    ("cbn::map_kernel<cbn::Config<float, 4, false>, (cbn::Pass)3>", BACKWARD, 200.0),
    ("cbn::finish_kernel<float>", FORWARD, 1.0),
]


def kernel_rows(**changes) -> list[KernelRow]:
    labels = {"provider": OURS, "shape": "64x256x56x56", "dtype": "float32", "layout": "contiguous", "M": 4}
    return [
        KernelRow(**labels | {"data": "mixed"} | changes, direction=direction, kernel=name, calls=1, device_us=time)
        for name, direction, time in KERNELS
    ]


def test_passes_are_told_by_kernel_and_direction():
    case = ("64x256x56x56", "float32", "contiguous")
    mega = 64 * 256 * 56 * 56 * 4 / 1e6  # MB of x, and µs that it takes at 1 TB/s
    rows = kernel_rows() + kernel_rows(provider=OURS + RELU) + kernel_rows(M=8)
    assert pass_percents(rows, COPY) == {
        ("statistics", *case): pytest.approx(mega / 100 / 4 * 100),
        ("normalise", *case): pytest.approx(2 * mega / 125 / 4 * 100),
        ("backward reduction", *case): pytest.approx(2 * mega / 100 / 4 * 100),
        ("input gradient", *case): pytest.approx(3 * mega / 200 / 4 * 100),
    }


def test_targets_have_the_worst_means_passes_times_and_sizes():
    medians = {
        OURS: 9.0, BATCHNORM: 10.0,
        OURS + RELU: 8.0, BATCHNORM + RELU: 10.0, BATCHNORM + RELU + COMPILED: 7.0,
        OURS + ADD_RELU: 8.0, BATCHNORM + ADD_RELU: 16.0, REFERENCE + COMPILED: 54.0,
    }  # fmt: skip
    rows = rows_of(medians)
    rows += rows_of({OURS: 12.0, BATCHNORM: 10.0}, layout="channels_last")
    rows += rows_of({OURS: 11.0, BATCHNORM: 10.0}, dtype="bfloat16")
    rows += rows_of({OURS: 13.0, BATCHNORM: 10.0}, dtype="float16")
    rows += rows_of({OURS: 5.0, BATCHNORM: 5.0}, direction=EVALUATION)
    rows += rows_of({OURS + JOINT: 14.0, BATCHNORM: 10.0}, dtype="float16", layout="channels_last")
    for l2, forward in (("cold", 5.5), ("hot", 3.0)):
        for shape, direction, more in (("128x16x32x32", FORWARD, 0), ("128x64x8x8", BACKWARD, 1)):
            rows += rows_of({OURS: forward + more}, l2=l2, shape=shape, direction=direction)
    memory = [
        MemoryRow(OURS, "1x1", "float32", "contiguous", 4, "mixed", 1000, 30, None),
        MemoryRow(BATCHNORM, "1x1", "float32", "contiguous", 1, "mixed", 1000, 10, None),
    ]
    values = {t.what: t.value for t in targets(rows, memory, kernel_rows(), COPY)}
    mega = 64 * 256 * 56 * 56 * 4 / 1e6

    def percent(name: str) -> str:
        return f"% of copy bandwidth, {name}, ResNet-50 shapes, float32"

    slowest = "slowest CIFAR shape, dtype and layout, L2"
    assert values == {
        "forward+backward, cbn_ext / BatchNorm2d, float32": pytest.approx(1.2),
        "forward+backward, cbn_ext / BatchNorm2d, 16-bit": pytest.approx(1.3),
        "forward+backward, cbn_ext joint / BatchNorm2d, float32": None,
        "forward+backward, cbn_ext joint / BatchNorm2d, 16-bit": pytest.approx(1.4),
        "forward+backward, cbn_ext + ReLU / BatchNorm2d + ReLU": pytest.approx(0.8),
        "forward+backward, cbn_ext + ReLU / BatchNorm2d + ReLU compiled": pytest.approx(8 / 7),
        "forward+backward, cbn_ext + add + ReLU / BatchNorm2d + add + ReLU": pytest.approx(0.5),
        "forward+backward, cbn_ext + add + ReLU / BatchNorm2d + add + ReLU compiled": None,
        "forward+backward, reference compiled / cbn_ext": pytest.approx(6.0),
        "evaluation forward, cbn_ext / BatchNorm2d": pytest.approx(1.0),
        percent("statistics"): pytest.approx(mega / 4),
        percent("normalise"): pytest.approx(mega * 2 / 5),
        percent("backward reduction"): pytest.approx(mega / 2),
        percent("input gradient"): pytest.approx(mega * 3 / 8),
        f"µs, forward, {slowest} cold": 5.5,
        f"µs, forward, {slowest} hot": 3.0,
        f"µs, backward, {slowest} cold": 6.5,
        f"µs, backward, {slowest} hot": 4.0,
        "peak memory beyond input and output, cbn_ext / BatchNorm2d, worst case": 3.0,
        "peak memory in all, cbn_ext / BatchNorm2d, worst case": pytest.approx(1030 / 1010),
    }


def test_report_has_all_tables_failures_and_what_was_left_out(tmp_path):
    times = []
    for layout in ("contiguous", "channels_last"):
        for direction in (*DIRECTIONS, EVALUATION):
            times += rows_of({OURS: 15.0, BATCHNORM: 10.0}, direction=direction, layout=layout)
    found = Measured(
        times=times,
        memory=[MemoryRow(OURS, "64x256x56x56", "float32", "contiguous", 4, "mixed", 9, 2 * 64 * 256 * 56 * 56, None)],
        kernels=kernel_rows(),
        failures=["reference, somewhere: OutOfMemoryError: too big"],
        left_out={"float16": ["1x1x1x1", "2x2x2x2"]},
        seconds=12.3,
    )
    report.make_report(ENVIRONMENT, found).write(tmp_path)
    written = {path.name: path for path in tmp_path.iterdir()}
    endings = (".csv", "-memory.csv", "-kernels.csv", "-float32.png", ".md")
    assert set(written) == {"cuda-some-gpu-9" + ending for ending in endings}
    summary = written["cuda-some-gpu-9.md"].read_text()
    for line in (
        "A copy on the device moves 4,000 GB/s. Measured in 12 s.",
        "- FAILED: reference, somewhere: OutOfMemoryError: too big",
        "- Left out of float16, the time was over (2): 1x1x1x1; 2x2x2x2",
        "| forward+backward, cbn_ext / BatchNorm2d, float32 | 1.50 | ≤ 1 | missed |",
        "| cbn_ext | 4 | 0.500 | 0.500 | 1 |",
        "| 64x256x56x56 float32 contiguous | cbn_ext | 4 | forward | 15.0 | 19.0 | `k` |",
    ):
        assert line in summary
    with written["cuda-some-gpu-9.csv"].open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["l2"], row["driver"], row["copy_gb_per_s"], row["kernels"]) == ("cold", "555.1", "4000.0", "k")


def test_the_summary_of_everything_has_60_lines_at_most(tmp_path):
    found = Measured()
    for comparison in plan.comparisons():
        case = comparison.case
        times = product(("cold", "hot"), (*DIRECTIONS, EVALUATION))
        if comparison.phase == "eager":
            times = [("eager", BOTH)]
        for (name, m), (l2, direction) in product(comparison.members, times):
            labels = replace(case, components=m).labels
            found.times.append(cuda_row(provider=name, **labels, l2=l2, direction=direction, phase=comparison.phase))
            found.memory.append(MemoryRow(provider=name, **labels, in_out=1, beyond=1, resident=None))
    found.kernels = kernel_rows()
    found.kernels += [replace(row, kernel="cbn::resident_kernel<a>") for row in found.kernels]
    name = report_name("cuda", ENVIRONMENT["device"])
    write_csvs(tmp_path, "cuda-an-older-gpu", report.csv_of(Measured(rows_of({OURS: 1.0}))), ENVIRONMENT)
    os.utime(tmp_path / "cuda-an-older-gpu.csv", (0, 0))
    write_csvs(tmp_path, name, report.csv_of(found), ENVIRONMENT)
    lines = report.summary(tmp_path)
    assert 45 <= len(lines) <= 60
    text = "\n".join(lines)
    assert "not measured" not in text
    for what in (
        "% of copy bandwidth, backward on chip",
        "8x16x8x8    BatchNorm2d  1",
        "Highest ratios to BatchNorm2d",
    ):
        assert what in text


def test_a_report_of_nothing_is_written_too(tmp_path):
    report.make_report(ENVIRONMENT, Measured(left_out={"plain": ["all"]})).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cuda-some-gpu-9.md"]
    assert "not measured" in (tmp_path / "cuda-some-gpu-9.md").read_text()


def test_without_matplotlib_there_are_no_pictures_and_the_report_says_so(monkeypatch, tmp_path):
    found = Measured(times=rows_of({OURS: 10.0, BATCHNORM: 12.0}))
    assert report.make_report(ENVIRONMENT, found).pictures
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    without = report.make_report(ENVIRONMENT, found)
    assert not without.pictures
    assert without.warnings == ["No pictures: matplotlib is not installed."]
