"""The CUDA benchmark without a GPU: its plan, budget, rows, targets and tables, with a timer that is told the times."""

import csv
import io
from dataclasses import dataclass, field, replace

import pytest
import torch
from rich.console import Console

from bench import cuda, cuda_compare, cuda_report, cuda_tables, providers
from bench.compare import Comparison
from bench.cuda_compare import CudaRow, DeviceLostError, Failure, KernelRow, Measured, measure, rotated_steps
from bench.cuda_targets import Times, pass_percents, targets
from bench.graphs import Environment
from bench.harness import BACKWARD, BOTH, DIRECTIONS, EVALUATION, FORWARD, MemoryRow
from bench.providers import (
    BATCHNORM,
    BATCHNORM_ADD_RELU,
    BATCHNORM_COMPILED,
    BATCHNORM_RELU,
    BATCHNORM_RELU_COMPILED,
    OURS,
    OURS_ADD_RELU,
    OURS_RELU,
    PROVIDERS,
    REFERENCE_COMPILED,
    STREAMING,
    Case,
)
from bench.trace import Kernel, listed, short_name, split_replays, summed

COPY = 4000.0  # GB/s
ENVIRONMENT = Environment("Some GPU 9", "555.1", "13.0", 91000, "2.11.0", "0.1.0", "2026-01-31", COPY)
SMALL = Case((4, 6, 5, 5))
CACHE = 3 * 4 * SMALL.tensor_bytes


@dataclass
class FakeTimer:
    """A GPU whose steps take what they are told: `captured` is (provider's name, steps, cold)."""

    microseconds: dict[str, float]
    cache_bytes: int = CACHE
    broken: tuple[str, ...] = ()
    lost: bool = False
    captured: list = field(default_factory=list)

    def peak_memory(self, step):
        assert [tensor.dim() for tensor in step()] in ([4] * 2, [4] * 3)
        return 100

    def capture(self, workloads, cold, evaluation):
        name = next(name for name, provider in PROVIDERS.items() if provider == workloads[0].provider)
        if name in self.broken:
            raise RuntimeError(f"{name} cannot be captured\nand a long explanation")
        addresses = {workload.problem.x.data_ptr() for workload in workloads}
        assert len(addresses) == (len(workloads) if cold else 1)
        self.captured.append((name, len(workloads), cold))
        return name, evaluation, cold

    def measure(self, captured):
        name, evaluation, cold = captured
        forward = self.microseconds[name] * (1 if cold else 0.5)
        times = {FORWARD: forward, BACKWARD: 2 * forward, BOTH: 3 * forward}
        return times | ({EVALUATION: forward} if evaluation else {})

    def kernels(self, captured):
        return [
            {d: [Kernel(f"{name} {d}", 1, 7.0), Kernel("add", 2, 1.0)] for d in (FORWARD, BACKWARD, EVALUATION)}
            for name, _, _ in captured
        ]

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access")

    def release(self):
        pass


MEMBERS = ((OURS, 4), (BATCHNORM, 1), (OURS_ADD_RELU, 4), (BATCHNORM_ADD_RELU, 1))
TIMES = {OURS: 10.0, BATCHNORM: 20.0, OURS_ADD_RELU: 12.0, BATCHNORM_ADD_RELU: 48.0}


def measured(timer, members=MEMBERS, case=SMALL):
    found = Measured()
    measure(Comparison(case, members), timer, COPY, found)
    return found


def test_rows_of_a_comparison():
    found = measured(FakeTimer(TIMES))
    rows = {(row.provider, row.l2, row.direction): row for row in found.times}
    assert len(rows) == len(found.times) == 4 * 2 * 4
    row = rows[OURS_ADD_RELU, "cold", BACKWARD]
    assert (row.median_us, row.ratio_to_batchnorm, row.M) == (24.0, 0.25, 4)
    assert row.gb_per_s == pytest.approx(4 * SMALL.tensor_bytes / 24e3)
    assert row.copy_percent == pytest.approx(row.gb_per_s / 40)
    assert (row.device_us, row.kernels) == (8.0, f"{OURS_ADD_RELU} backward; 2 add")
    assert rows[OURS, "cold", BOTH].device_us == 16.0
    assert rows[OURS, "cold", BOTH].kernels == f"{OURS} forward; 2 add; {OURS} backward; 2 add"
    assert rows[OURS, "cold", EVALUATION].ratio_to_batchnorm == 0.5
    hot = rows[OURS, "hot", FORWARD]
    assert (hot.median_us, hot.device_us, hot.kernels) == (5.0, None, "")
    assert len(found.kernels) == 4 * 3 * 2
    assert (found.kernels[0].kernel, found.kernels[0].device_us, found.kernels[1].calls) == (f"{OURS} forward", 7.0, 2)
    assert [row.in_out // SMALL.tensor_bytes for row in found.memory] == [4, 4, 6, 6]
    assert found.failures == []


def test_cold_steps_have_tensors_of_their_own_and_hot_ones_share_theirs():
    timer = FakeTimer(TIMES)
    measured(timer)
    assert timer.captured[:2] == [(OURS, cuda_compare._MOST_STEPS, True), (OURS, cuda_compare._HOT_STEPS, False)]


def test_inputs_larger_than_the_cache_have_no_hot_times():
    found = measured(FakeTimer(TIMES, cache_bytes=5 * SMALL.tensor_bytes - 1))
    assert {row.l2 for row in found.times} == {"cold"}


@pytest.mark.parametrize(
    ("shape", "steps"),
    [((1, 1, 1000, 1000), 100), ((1, 1, 100, 100), 750), ((1, 1, 10**4, 10**4), 1), ((1, 1, 2000, 1000), 50)],
)
def test_rotated_tensors_fill_the_cache_three_times(shape, steps):
    # 4 MB: 0.8 GB of x and y; 40 kB: three times 20 MB; 400 MB: one.
    assert rotated_steps(Case(shape), cache_bytes=20 * 10**6) == steps


def test_a_member_that_fails_is_named_and_the_others_are_measured():
    found = measured(FakeTimer(TIMES, broken=(BATCHNORM,)))
    assert found.failures == [
        Failure(BATCHNORM, "4x6x5x5 float32 contiguous", f"RuntimeError: {BATCHNORM} cannot be captured", False)
    ]
    assert {row.provider for row in found.times} == {OURS, OURS_ADD_RELU, BATCHNORM_ADD_RELU}
    assert {row.ratio_to_batchnorm for row in found.times if row.provider == OURS} == {None}
    assert {row.ratio_to_batchnorm for row in found.times if row.provider == OURS_ADD_RELU} == {0.25}


def test_nothing_is_captured_after_a_wrong_result(monkeypatch):
    right = providers.LayerWorkload.backward

    def wrong(self, output):
        gradients = right(self, output)
        return (gradients[0] * (1.01 if self.provider.layer == "cbn_ext" else 1.0), *gradients[1:])

    monkeypatch.setattr(providers.LayerWorkload, "backward", wrong)
    timer = FakeTimer(TIMES)
    found = measured(timer)
    assert [(failure.what, failure.ours) for failure in found.failures] == [(OURS, True), (OURS_ADD_RELU, True)]
    assert "grad x differs from the float64 reference by 0.01" in found.failures[0].error
    assert {name for name, _, _ in timer.captured} == {BATCHNORM, BATCHNORM_ADD_RELU}


def test_a_wrong_evaluation_is_a_failure(monkeypatch):
    monkeypatch.setattr(providers.LayerWorkload, "evaluate", lambda self: self.problem.x.detach())
    (failure,) = measured(FakeTimer(TIMES), MEMBERS[1:2]).failures
    assert f"{BATCHNORM} in evaluation, shape 4x6x5x5" in failure.error


def test_results_are_checked_in_first_and_last_channels(monkeypatch):
    monkeypatch.setattr(cuda_compare, "_CHECKED_ELEMENTS", 3 * SMALL.tensor_bytes // 4 // 6)
    seen = []
    monkeypatch.setattr(cuda_compare, "part_of", lambda p, c: seen.append(c.tolist()) or providers.part_of(p, c))
    assert measured(FakeTimer(TIMES)).failures == []
    assert seen == [[0, 2, 5]] * 4


def test_a_lost_device_ends_the_measurement():
    with pytest.raises(DeviceLostError, match=f"^{OURS}, 4x6x5x5 float32 contiguous: RuntimeError: "):
        measured(FakeTimer(TIMES, broken=(OURS,), lost=True))


def test_the_plan_has_every_shape_dtype_and_layout_once():
    plan = cuda.comparisons()
    mixed = [(c.case.shape, c.case.dtype, c.case.layout) for c in plan if c.case.data == "mixed"]
    assert len(mixed) == len(set(mixed)) == 15 * 3 * 2
    assert sorted(c.case.data for c in plan if c.case.data != "mixed") == ["constant", "saturated"]
    assert {name for c in plan for name, _ in c.members} == set(PROVIDERS)
    assert {m for c in plan for name, m in c.members if name == OURS} == {1, 2, 4, 8}
    # When time runs short, every dtype and layout has been measured at the same shapes.
    assert len({shape for shape, _, _ in mixed[:6]}) == 1
    for comparison in plan:
        assert {(OURS, 4), (BATCHNORM, 1)} <= set(comparison.members)
        assert comparison.case.device == "cuda"


class Clock:
    """Time that passes when something is measured."""

    def __init__(self, eager: float, compiled: float) -> None:
        self.now, self.eager, self.compiled, self.measured = 0.0, eager, compiled, []

    def measure(self, comparison, timer, copy_gb_per_s, found):
        names = [name for name, _ in comparison.members]
        self.now += self.eager + self.compiled * any(PROVIDERS[name].compiled for name in names)
        self.measured.append(names)
        found.times.append(len(self.measured))

    def __call__(self) -> float:
        return self.now


PLAN = [Comparison(replace(SMALL, shape=(n, 1, 1, 1)), ((BATCHNORM, 1), (BATCHNORM_COMPILED, 1))) for n in range(2, 12)]


def budgeted(monkeypatch, clock: Clock, seconds: float):
    monkeypatch.setattr(cuda, "measure", clock.measure)
    said, saved = [], []
    save = lambda found: saved.append((len(found.times), found.seconds))  # noqa: E731
    return cuda.run(None, COPY, PLAN, seconds, said.append, save, clock), said, saved


def test_all_is_measured_when_there_is_time(monkeypatch):
    clock = Clock(eager=1.0, compiled=9.0)
    found, said, saved = budgeted(monkeypatch, clock, 200.0)
    assert clock.measured == [[BATCHNORM, BATCHNORM_COMPILED]] * 10
    assert found.left_out == []
    assert said[1] == "  10 s, 2 of 10: 3x1x1x1 float32 contiguous, with compiled ones"
    assert saved == [(n, 10.0 * n) for n in range(1, 11)]


def test_compiled_members_are_left_out_first(monkeypatch):
    clock = Clock(eager=2.0, compiled=10.0)
    found, _, _ = budgeted(monkeypatch, clock, 55.0)
    # Of the 55 seconds, 20 are for the eager members; three times 10 fit beside them.
    assert clock.measured == [[BATCHNORM, BATCHNORM_COMPILED]] * 3 + [[BATCHNORM]] * 7
    assert found.left_out == [f"{n}x1x1x1 float32 contiguous: {BATCHNORM_COMPILED}" for n in range(5, 12)]
    assert found.seconds == 50.0


def test_what_the_time_does_not_suffice_for_is_named(monkeypatch):
    clock = Clock(eager=2.0, compiled=10.0)
    found, _, _ = budgeted(monkeypatch, clock, 7.0)
    assert clock.measured == [[BATCHNORM]] * 3
    assert found.left_out[3:] == [f"{n}x1x1x1 float32 contiguous: all" for n in range(5, 12)]


def test_slow_machines_lower_what_is_still_tried(monkeypatch):
    clock = Clock(eager=8.0, compiled=0.0)
    found, _, _ = budgeted(monkeypatch, clock, 29.0)
    # After a first guess of 2 seconds the mean rises: 2, 5, 6, 6.5; what remains falls: 29, 21, 13, 5.
    assert len(clock.measured) == 3
    assert found.seconds == 24.0


@pytest.mark.parametrize(
    ("error", "why"), [(DeviceLostError("gone"), "the device failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_what_was_measured_before_the_end_is_kept(monkeypatch, error, why):
    clock = Clock(eager=1.0, compiled=1.0)

    def measure_two(*arguments):
        if len(clock.measured) == 2:
            raise error
        clock.measure(*arguments)

    monkeypatch.setattr(cuda, "measure", measure_two)
    saved = []
    found = cuda.run(None, COPY, PLAN, 100.0, lambda line: None, lambda found: saved.append(len(found.times)), clock)
    assert saved == [1, 2, 2]
    assert found.left_out[0] == f"4x1x1x1 float32 contiguous: all, {why}"
    assert len(found.left_out) == 8


def test_inputs_that_cannot_be_made_do_not_end_the_measurement(monkeypatch):
    def no_memory(comparison, *others):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(cuda, "measure", no_memory)
    found = cuda.run(None, COPY, PLAN[:2], 100.0, lambda line: None, lambda found: None)
    assert [(failure.what, failure.where, failure.error) for failure in found.failures] == [
        ("the inputs", f"{n}x1x1x1 float32 contiguous", "OutOfMemoryError: CUDA out of memory.") for n in (2, 3)
    ]


def cuda_row(**changes) -> CudaRow:
    row = CudaRow(
        OURS, "64x256x56x56", "float32", "contiguous", 4, "mixed", BOTH,
        20.0, 18.0, 25.0, 7, 1500.0, 2.0, "cold", 37.5, 19.0, "k",
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
    assert times.mean(OURS, BATCHNORM, ("float32", "contiguous")) == pytest.approx(2.0)
    assert times.mean(OURS, BATCHNORM, ("float32", "channels_last")) is None
    assert times.worst(OURS, BATCHNORM) == pytest.approx(2.0)
    assert Times(rows, "hot").mean(OURS, BATCHNORM, ("float32", "contiguous")) == pytest.approx(99.0)


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
    rows = kernel_rows() + kernel_rows(provider=STREAMING) + kernel_rows(M=8)
    assert pass_percents(rows, OURS, COPY) == {
        ("statistics", *case): pytest.approx(mega / 100 / 4 * 100),
        ("normalise", *case): pytest.approx(2 * mega / 125 / 4 * 100),
        ("backward reduction", *case): pytest.approx(2 * mega / 100 / 4 * 100),
        ("input gradient", *case): pytest.approx(3 * mega / 200 / 4 * 100),
    }


def test_targets_are_the_issues():
    medians = {
        OURS: 9.0, BATCHNORM: 10.0,
        OURS_RELU: 8.0, BATCHNORM_RELU: 10.0, BATCHNORM_RELU_COMPILED: 7.0,
        OURS_ADD_RELU: 8.0, BATCHNORM_ADD_RELU: 16.0, REFERENCE_COMPILED: 54.0,
    }  # fmt: skip
    rows = rows_of(medians)
    rows += rows_of({OURS: 12.0, BATCHNORM: 10.0}, layout="channels_last")
    rows += rows_of({OURS: 11.0, BATCHNORM: 10.0}, dtype="bfloat16")
    rows += rows_of({OURS: 13.0, BATCHNORM: 10.0}, dtype="float16")
    rows += rows_of({OURS: 5.0, BATCHNORM: 5.0}, direction=EVALUATION)
    for l2, forward in (("cold", 5.5), ("hot", 3.0)):
        for shape, direction, more in (("128x16x32x32", FORWARD, 0), ("128x64x8x8", BACKWARD, 1)):
            rows += rows_of({OURS: forward + more}, l2=l2, shape=shape, direction=direction)
    memory = [
        MemoryRow(OURS, "1x1", "float32", "contiguous", 4, "mixed", 1000, 30, None),
        MemoryRow(BATCHNORM, "1x1", "float32", "contiguous", 1, "mixed", 1000, 10, None),
    ]
    values = {t.what: (t.value, t.relation, t.limit) for t in targets(rows, memory, kernel_rows(), COPY)}
    mega = 64 * 256 * 56 * 56 * 4 / 1e6

    def percent(name: str) -> str:
        return f"% of copy bandwidth, {name}, ResNet-50 shapes, float32"

    slowest = "slowest CIFAR shape, dtype and layout, L2"
    assert values == {
        "forward+backward, cbn_ext / BatchNorm2d, float32": (pytest.approx(1.2), "≤", 1.0),
        "forward+backward, cbn_ext / BatchNorm2d, 16-bit": (pytest.approx(1.3), "≤", 1.15),
        "forward+backward, cbn_ext + ReLU / BatchNorm2d + ReLU": (pytest.approx(0.8), "≤", 0.8),
        "forward+backward, cbn_ext + ReLU / BatchNorm2d + ReLU compiled": (pytest.approx(8 / 7), "≤", 1.0),
        "forward+backward, cbn_ext + add + ReLU / BatchNorm2d + add + ReLU": (pytest.approx(0.5), "≤", 0.8),
        "forward+backward, cbn_ext + add + ReLU / BatchNorm2d + add + ReLU compiled": (None, "≤", 1.0),
        "forward+backward, reference compiled / cbn_ext": (pytest.approx(6.0), "≥", 5),
        "evaluation forward, cbn_ext / BatchNorm2d": (pytest.approx(1.0), "≤", 1.1),
        percent("statistics"): (pytest.approx(mega / 4), "≥", 80),
        percent("normalise"): (pytest.approx(mega * 2 / 5), "≥", 80),
        percent("backward reduction"): (pytest.approx(mega / 2), "≥", 80),
        percent("input gradient"): (pytest.approx(mega * 3 / 8), "≥", 80),
        f"µs, forward, {slowest} cold": (5.5, "≤", 6),
        f"µs, forward, {slowest} hot": (3.0, "≤", 6),
        f"µs, backward, {slowest} cold": (6.5, "≤", 6),
        f"µs, backward, {slowest} hot": (4.0, "≤", 6),
        "peak memory beyond input and output, cbn_ext / BatchNorm2d, worst case": (3.0, "≤", 1.0),
        "peak memory in all, cbn_ext / BatchNorm2d, worst case": (pytest.approx(1030 / 1010), "≤", 1.0),
    }


def test_the_fastest_path_is_named():
    rows = []
    for direction, streaming in ((FORWARD, 20.0), (BACKWARD, 10.0), (BOTH, 30.0)):
        rows += rows_of({OURS: 15.0, STREAMING: streaming}, direction=direction)
    (section,) = cuda_tables.path_table(rows).sections
    assert section == [
        ["64x256x56x56 float32 contiguous", "15.0", "20.0", "", OURS, "15.0", "10.0", "", STREAMING],
    ]


def test_report_has_all_tables_failures_and_what_was_left_out(tmp_path):
    times = []
    for layout in ("contiguous", "channels_last"):
        for direction in (*DIRECTIONS, EVALUATION):
            times += rows_of({OURS: 15.0, BATCHNORM: 10.0}, direction=direction, layout=layout)
    found = Measured(
        times=times,
        memory=[MemoryRow(OURS, "64x256x56x56", "float32", "contiguous", 4, "mixed", 9, 2 * 64 * 256 * 56 * 56, None)],
        kernels=kernel_rows(),
        failures=[Failure("reference", "somewhere", "OutOfMemoryError: too big", False)],
        left_out=["1x1x1x1 float16 contiguous: all"],
        seconds=12.3,
    )
    report = cuda_report.make_report(ENVIRONMENT, found)
    report.write(tmp_path)
    written = {path.name: path for path in tmp_path.iterdir()}
    endings = (".csv", "-memory.csv", "-kernels.csv", "-float32.png", ".md")
    assert set(written) == {"cuda-some-gpu-9" + ending for ending in endings}
    summary = written["cuda-some-gpu-9.md"].read_text()
    for line in (
        "A copy on the device moves 4,000 GB/s. Measured in 12 s.",
        "- FAILED: reference, somewhere: OutOfMemoryError: too big",
        "- Left out, the time was over (1): 1x1x1x1 float16 contiguous: all",
        "| forward+backward, cbn_ext / BatchNorm2d, float32 | 1.50 | ≤ 1 | missed |",
        "| cbn_ext | 4 | 0.500 | 0.500 | 1 |",
        "| 64x256x56x56 float32 contiguous | cbn_ext | 4 | forward | 15.0 | 19.0 | `k` |",
    ):
        assert line in summary
    with written["cuda-some-gpu-9.csv"].open(newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["l2"], row["driver"], row["copy_gb_per_s"], row["kernels"]) == ("cold", "555.1", "4000.0", "k")


@pytest.mark.parametrize(("broken", "status"), [((), 0), ((BATCHNORM_RELU,), 0), ((OURS_RELU,), 1)])
def test_a_whole_run(monkeypatch, tmp_path, broken, status):
    members = (*MEMBERS, (OURS_RELU, 4), (BATCHNORM_RELU, 1))

    class Timer(FakeTimer):
        def __init__(self):
            super().__init__(TIMES | {OURS_RELU: 11.0, BATCHNORM_RELU: 22.0}, broken=broken)

        def environment(self):
            return ENVIRONMENT

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("cbn_ext.build_info", lambda: {"cuda_load_error": None})
    monkeypatch.setattr(cuda_report, "Timer", Timer)
    monkeypatch.setattr(cuda, "comparisons", lambda: [Comparison(SMALL, members)])
    output = io.StringIO()
    assert cuda_report.run(Console(file=output, width=150), 100.0, tmp_path) == status
    for line in (
        "   0 s, 1 of 1: 4x6x5x5 float32 contiguous",
        "forward+backward, cbn_ext / BatchNorm2d, float32",
        "wrote ",
        *(f"FAILED: {name}, 4x6x5x5 float32 contiguous: RuntimeError: {name} cannot be captured" for name in broken),
    ):
        assert line in output.getvalue()
    summary = (tmp_path / "cuda-some-gpu-9.md").read_text()
    assert "| 4x6x5x5 float32 contiguous | 60.0 | 30.0 | 0.50 | 0.50 | 0.50 | 0.50 |" in summary


def test_a_report_of_nothing_is_written_too(tmp_path):
    report = cuda_report.make_report(ENVIRONMENT, Measured(left_out=["all"]))
    report.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cuda-some-gpu-9.md"]
    assert "not measured" in (tmp_path / "cuda-some-gpu-9.md").read_text()


@pytest.mark.parametrize(
    ("gpu", "error", "message"),
    [
        (False, None, "expected a GPU .* finds none"),
        (True, "not built", "expected the CUDA library .*: not built"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, tmp_path, gpu, error, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("cbn_ext.build_info", lambda: {"cuda_load_error": error})
    with pytest.raises(SystemExit, match=message):
        cuda_report.run(None, 1.0, tmp_path)


def test_replays_are_told_apart_by_the_marker():
    events = [("before", 1.0), ("spin_kernel(long)", 9.0), ("a", 1.0), ("b", 2.0), ("spin_kernel(long)", 9.0)]
    assert split_replays(events) == [[("a", 1.0), ("b", 2.0)], []]


def test_kernels_are_summed_by_name_for_one_step():
    replay = [("void b<1>(int)", 2.0), ("a", 4.0), ("void b<2>(int)", 4.0), ("a", 8.0), ("a", 4.0), ("a", 4.0)]
    kernels = summed(replay, 2)
    assert kernels == [Kernel("b", 1, 3.0), Kernel("a", 2, 10.0)]
    assert listed(kernels) == "b; 2 a"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void at::native::(anonymous namespace)::batch_norm_reduce_kernel<float, int>(at::Tensor<float>)",
            "batch_norm_reduce_kernel",
        ),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, (bool)1>(Struct, int)", "cudnn::bn_fw_tr_1C11_kernel_NCHW"),
        ("triton_red_fused_native_batch_norm_0", "triton_red_fused_native_batch_norm_0"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        (
            "void cbn::map_kernel<cbn::Config<float, 4, false>, (cbn::Pass)1>(cbn::Arguments)",
            "cbn::map_kernel<cbn::Config<float, 4, false>, (cbn::Pass)1>",
        ),
    ],
)
def test_kernel_names_are_shortened(name, short):
    assert short_name(name) == short


def test_tensors_of_every_member_are_the_same():
    tensors = cuda_compare._tensors(
        providers.make_problem(replace(SMALL, layout="channels_last", dtype=torch.bfloat16))
    )
    problem = providers.make_problem(replace(SMALL, layout="channels_last", dtype=torch.bfloat16))
    for name, tensor in tensors.items():
        original = getattr(problem, name)
        assert torch.equal(tensor, original)
        assert tensor.stride() == original.stride()
        assert tensor.requires_grad is original.requires_grad
