"""The CUDA benchmark without a GPU: its plan, budget, checks and rows, with a timer that is told the times."""

import os
import shutil
from dataclasses import dataclass, field, replace

import pytest
import torch

import cbn_ext
from bench import cases, providers
from bench.cases import ADD_RELU, RELU, Case
from bench.cuda import measure, plan, report, sweep, tables
from bench.cuda.measure import CudaRow, DeviceLostError, KernelRow, Measured
from bench.cuda.timer import Kernel
from bench.harness import BACKWARD, BOTH, EVALUATION, FORWARD, MemoryRow
from bench.providers import BATCHNORM, COMPILED, OURS, PROVIDERS, SPLIT, Comparison
from bench.report import read_csv

COPY = 4000.0  # GB/s
ENVIRONMENT = {
    "device": "Some GPU 9", "driver": "555.1", "cuda": "13.0", "cudnn": 91000,
    "torch": "2.11.0", "cbn_ext": "0.1.0", "date": "2026-01-31", "copy_gb_per_s": COPY,
}  # fmt: skip
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
        name = workloads[0].provider.name
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


MEMBERS = ((OURS, 4), (BATCHNORM, 1), (OURS + ADD_RELU, 4), (BATCHNORM + ADD_RELU, 1))
TIMES = {OURS: 10.0, BATCHNORM: 20.0, OURS + ADD_RELU: 12.0, BATCHNORM + ADD_RELU: 48.0}


def measured(timer, members=MEMBERS, case=SMALL):
    found = Measured()
    measure.measure(Comparison(case, members, "some phase"), timer, COPY, found)
    return found


def test_rows_of_a_comparison():
    found = measured(FakeTimer(TIMES))
    rows = {(row.provider, row.l2, row.direction): row for row in found.times}
    assert len(rows) == len(found.times) == 4 * 2 * 4
    row = rows[OURS + ADD_RELU, "cold", BACKWARD]
    assert (row.median_us, row.ratio_to_batchnorm, row.M, row.phase) == (24.0, 0.25, 4, "some phase")
    assert row.gb_per_s == pytest.approx(4 * SMALL.tensor_bytes / 24e3)
    assert row.copy_percent == pytest.approx(row.gb_per_s / 40)
    assert (row.device_us, row.kernels) == (8.0, f"{OURS + ADD_RELU} backward; 2 add")
    assert rows[OURS, "cold", BOTH].device_us == 16.0
    assert rows[OURS, "cold", BOTH].kernels == f"{OURS} forward; 2 add; {OURS} backward; 2 add"
    assert rows[OURS, "cold", EVALUATION].ratio_to_batchnorm == 0.5
    hot = rows[OURS, "hot", FORWARD]
    assert (hot.median_us, hot.device_us, hot.kernels) == (5.0, None, "")
    assert len(found.kernels) == 4 * 3 * 2
    assert (found.kernels[0].kernel, found.kernels[0].device_us, found.kernels[1].calls) == (f"{OURS} forward", 7.0, 2)
    assert [row.in_out // SMALL.tensor_bytes for row in found.memory] == [4, 4, 6, 6]
    assert found.failures == []


def test_split_mode_is_checked_by_its_groups_and_not_in_evaluation():
    found = measured(FakeTimer(TIMES | {OURS + SPLIT: 5.0}), ((OURS + SPLIT, 4), *MEMBERS[:2]))
    assert found.failures == []
    rows = {(row.provider, row.direction): row for row in found.times if row.l2 == "cold"}
    assert rows[OURS + SPLIT, BOTH].ratio_to_batchnorm == 0.25
    assert (OURS, EVALUATION) in rows
    assert (OURS + SPLIT, EVALUATION) not in rows


def test_memory_and_kernels_of_what_is_measured_again_are_those_of_the_first_time():
    found = measured(FakeTimer(TIMES), MEMBERS[:2])
    memory, kernels = list(found.memory), list(found.kernels)
    measure.measure(Comparison(SMALL, MEMBERS, "again"), FakeTimer(TIMES), COPY, found)
    assert [row.phase for row in found.times] == ["some phase"] * 2 * 8 + ["again"] * 4 * 8
    assert (found.memory[:2], found.kernels[:12]) == (memory, kernels)
    assert [row.provider for row in found.memory[2:]] == [OURS + ADD_RELU, BATCHNORM + ADD_RELU]
    assert {row.provider for row in found.kernels[12:]} == {OURS + ADD_RELU, BATCHNORM + ADD_RELU}
    assert len(found.kernels) == 4 * 3 * 2


def test_eager_steps_are_queued_and_the_device_waited_for_once(monkeypatch):
    now = [0]

    class Waiting(FakeTimer):
        def synchronize(self):
            now[0] += 400_000  # ns

    def step(self, output):
        now[0] += 2000 * self.problem.case.components  # M microseconds a step, and the waiting's share
        return ()

    monkeypatch.setattr(
        providers.LayerWorkload,
        "forward",
        lambda self: now.__setitem__(0, now[0] + 1000 * self.problem.case.components),
    )
    monkeypatch.setattr(providers.LayerWorkload, "backward", step)
    monkeypatch.setattr("time.perf_counter_ns", lambda: now[0])
    found = Measured()
    measure.measure_eager(Comparison(SMALL, ((OURS, 4), (BATCHNORM, 1)), "eager"), Waiting({}), COPY, found)
    assert [(r.provider, r.M, r.l2, r.direction, r.device_us, r.kernels) for r in found.times] == [
        (OURS, 4, "eager", BOTH, None, ""),
        (BATCHNORM, 1, "eager", BOTH, None, ""),
    ]
    assert [row.median_us for row in found.times] == pytest.approx([16.0, 7.0])
    assert found.times[0].ratio_to_batchnorm == pytest.approx(16 / 7)


def test_cold_steps_have_tensors_of_their_own_and_hot_ones_share_theirs():
    timer = FakeTimer(TIMES)
    measured(timer)
    assert timer.captured[:2] == [(OURS, measure._MOST_STEPS, True), (OURS, measure._HOT_STEPS, False)]


def test_inputs_larger_than_the_cache_have_no_hot_times():
    found = measured(FakeTimer(TIMES, cache_bytes=5 * SMALL.tensor_bytes - 1))
    assert {row.l2 for row in found.times} == {"cold"}


@pytest.mark.parametrize(
    ("shape", "steps"),
    [((1, 1, 1000, 1000), 100), ((1, 1, 100, 100), 750), ((1, 1, 10**4, 10**4), 1), ((1, 1, 2000, 1000), 50)],
)
def test_rotated_tensors_fill_the_cache_three_times(shape, steps):
    # 4 MB: 0.8 GB of x and y; 40 kB: three times 20 MB; 400 MB: one.
    assert measure.rotated_steps(Case(shape), cache_bytes=20 * 10**6) == steps


def test_a_member_that_fails_is_named_and_the_others_are_measured():
    found = measured(FakeTimer(TIMES, broken=(BATCHNORM,)))
    where = "4x6x5x5 float32 contiguous"
    assert found.failures == [f"{BATCHNORM}, {where}: RuntimeError: {BATCHNORM} cannot be captured"]
    assert not found.broken
    assert {row.provider for row in found.times} == {OURS, OURS + ADD_RELU, BATCHNORM + ADD_RELU}
    assert {row.ratio_to_batchnorm for row in found.times if row.provider == OURS} == {None}
    assert {row.ratio_to_batchnorm for row in found.times if row.provider == OURS + ADD_RELU} == {0.25}


def test_nothing_is_captured_after_a_wrong_result(monkeypatch):
    right = providers.LayerWorkload.backward

    def wrong(self, output):
        gradients = right(self, output)
        return (gradients[0] * (1.01 if self.provider.layer == "cbn_ext" else 1.0), *gradients[1:])

    monkeypatch.setattr(providers.LayerWorkload, "backward", wrong)
    timer = FakeTimer(TIMES)
    found = measured(timer)
    assert [failure.partition(",")[0] for failure in found.failures] == [OURS, OURS + ADD_RELU]
    assert found.broken
    assert "grad x differs from the float64 reference by 0.01" in found.failures[0]
    assert {name for name, _, _ in timer.captured} == {BATCHNORM, BATCHNORM + ADD_RELU}


def test_a_wrong_evaluation_is_a_failure(monkeypatch):
    monkeypatch.setattr(providers.LayerWorkload, "evaluate", lambda self: self.problem.x.detach())
    (failure,) = measured(FakeTimer(TIMES), MEMBERS[1:2]).failures
    assert f"{BATCHNORM} in evaluation, shape 4x6x5x5" in failure


def test_results_are_checked_in_first_and_last_channels(monkeypatch):
    monkeypatch.setattr(measure, "_CHECKED_ELEMENTS", 3 * SMALL.tensor_bytes // 4 // 6)
    seen, right = [], cases.Problem.part
    look = lambda self, c: (seen.append(c.tolist()) if isinstance(c, torch.Tensor) else None) or right(self, c)  # noqa: E731
    monkeypatch.setattr(cases.Problem, "part", look)
    assert measured(FakeTimer(TIMES)).failures == []
    assert seen == [[0, 2, 5]] * 4


def test_a_lost_device_ends_the_measurement():
    with pytest.raises(DeviceLostError, match=f"^{OURS}, 4x6x5x5 float32 contiguous: RuntimeError: "):
        measured(FakeTimer(TIMES, broken=(OURS,), lost=True))


@pytest.mark.parametrize("make_plan", [plan.comparisons, plan.sweep])
def test_a_plan_has_each_case_once_in_a_phase_and_shape_after_shape(make_plan):
    comparisons = make_plan()
    phases = {}
    for comparison in comparisons:
        assert comparison.case.device == "cuda"
        phases.setdefault(comparison.phase, []).append(comparison.case)
    assert [case for found in phases.values() for case in found] == [c.case for c in comparisons]
    for found in phases.values():
        assert len(set(found)) == len(found)
        # When time runs short, all dtypes and layouts have been measured at the same shapes.
        by_shape = {case.shape: [] for case in found}
        for case in found:
            by_shape[case.shape].append((case.layout, case.dtype, case.data))
        assert [case.shape for case in found] == [shape for shape, kinds in by_shape.items() for _ in kinds]
        assert len({tuple(kinds) for kinds in by_shape.values()}) == 1


def test_the_plan_begins_with_ours_beside_batch_norm_and_has_every_provider():
    comparisons = plan.comparisons()
    assert comparisons[0].members == ((OURS, 4), (BATCHNORM, 1))
    names = {name for comparison in comparisons for name, _ in comparison.members}
    assert names == {name for name, provider in PROVIDERS.items() if not provider.settings}
    assert {c.case.dtype for c in comparisons} == {torch.float32, torch.float16, torch.bfloat16}
    assert {c.case.data for c in comparisons} == {"mixed", "saturated", "constant"}


@pytest.mark.parametrize(("name", "other"), sorted({relation[:2] for relation in tables.RELATIONS}))
def test_what_is_set_in_relation_is_measured_side_by_side_at_the_same_shapes(name, other):
    """In both dtypes and layouts."""
    wanted = {(each, 1 if each.startswith(BATCHNORM) else 4) for each in (name, other)}
    found = {c.case for c in plan.comparisons() if wanted <= set(c.members)}
    assert len({(case.layout, case.dtype) for case in found}) >= 4
    assert plan.SHAPES[:3] == tuple(dict.fromkeys(c.case.shape for c in plan.comparisons() if c.case in found))[:3]


def test_the_sweep_has_all_settings_in_each_comparison():
    settings = {(name, 4) for name, provider in PROVIDERS.items() if provider.settings}
    for comparison in plan.sweep():
        assert set(comparison.members) == settings | {(OURS, 4), (BATCHNORM, 1)}


class Clock:
    """Time that passes when something is measured: seconds by phase."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.seconds, self.measured = 0.0, seconds, []

    def measure(self, comparison, timer, copy_gb_per_s, found):
        self.now += self.seconds[comparison.phase]
        self.measured.append(comparison)
        found.times.append(len(self.measured))

    def __call__(self) -> float:
        return self.now


CASES = [replace(SMALL, shape=(n, 1, 1, 1)) for n in range(2, 6)]
PLAN = [Comparison(case, ((BATCHNORM, 1), *more), phase) for phase, more in (
    ("plain", ()),
    ("compiled", ((BATCHNORM + COMPILED, 1),)),
    ("float16", ()),
) for case in CASES]  # fmt: skip


def budgeted(monkeypatch, clock: Clock, seconds: float):
    monkeypatch.setattr(measure, "measure", clock.measure)
    saved = []
    save = lambda found: saved.append((len(found.times), found.seconds))  # noqa: E731
    return measure.run(None, COPY, PLAN, seconds, save, clock), saved


def test_all_is_measured_in_order_when_there_is_time(monkeypatch, capsys):
    clock = Clock(plain=1.0, compiled=9.0, float16=1.0)
    found, saved = budgeted(monkeypatch, clock, 200.0)
    assert clock.measured == PLAN
    assert found.left_out == {}
    assert capsys.readouterr().out.splitlines()[5] == "  13 s, 6 of 12, compiled: 3x1x1x1 float32 contiguous"
    assert saved == [(n, n if n <= 4 else 9 * n - 32 if n <= 8 else n + 32) for n in range(1, 13)]


def test_what_the_time_does_not_suffice_for_is_named_by_phase(monkeypatch):
    clock = Clock(plain=2.0, compiled=10.0, float16=2.0)
    # 8 for the first phase; two comparisons of the second, of which the first one is expected to take 15; 5 remain.
    found, saved = budgeted(monkeypatch, clock, 33.0)
    assert clock.measured == PLAN[:6] + PLAN[8:10]
    assert found.left_out == {
        "compiled": ["4x1x1x1 float32 contiguous", "5x1x1x1 float32 contiguous"],
        "float16": ["4x1x1x1 float32 contiguous", "5x1x1x1 float32 contiguous"],
    }
    assert found.seconds == 32.0
    assert len(saved) == 8


def test_compilation_is_not_begun_without_time_for_it(monkeypatch):
    clock = Clock(plain=2.0, compiled=10.0, float16=2.0)
    found, _ = budgeted(monkeypatch, clock, 8.0 + 14.0)
    assert clock.measured == PLAN[:4] + PLAN[8:]
    assert len(found.left_out["compiled"]) == 4


def test_slow_machines_lower_what_is_still_tried(monkeypatch):
    clock = Clock(plain=8.0)
    found, _ = budgeted(monkeypatch, clock, 26.0)
    # After a first guess of 2 seconds the phase is known to take 8; what remains falls: 26, 18, 10, 2.
    assert len(clock.measured) == 3
    assert (found.seconds, len(found.left_out["plain"]), len(found.left_out["compiled"])) == (24.0, 1, 4)


@pytest.mark.parametrize(
    ("error", "why"), [(DeviceLostError("gone"), "the device failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_what_was_measured_before_the_end_is_kept(monkeypatch, error, why):
    clock = Clock(plain=1.0)

    def measure_two(*arguments):
        if len(clock.measured) == 2:
            raise error
        clock.measure(*arguments)

    monkeypatch.setattr(measure, "measure", measure_two)
    saved = []
    found = measure.run(None, COPY, PLAN, 100.0, lambda found: saved.append(len(found.times)), clock)
    assert saved == [1, 2, 2]
    assert found.left_out["plain"] == [f"{n}x1x1x1 float32 contiguous ({why})" for n in (4, 5)]
    assert {phase: len(cases) for phase, cases in found.left_out.items()} == {"plain": 2, "compiled": 4, "float16": 4}


def test_inputs_that_cannot_be_made_do_not_end_the_measurement(monkeypatch):
    def no_memory(comparison, *others):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(measure, "measure", no_memory)
    found = measure.run(None, COPY, PLAN[:2], 100.0, lambda found: None)
    assert found.failures == [
        f"the inputs, {n}x1x1x1 float32 contiguous: OutOfMemoryError: CUDA out of memory." for n in (2, 3)
    ]


def test_tensors_of_every_step_are_the_same():
    problem = cases.make_problem(replace(SMALL, layout="channels_last", dtype=torch.bfloat16))
    for name, tensor in measure._copied(problem).items():
        original = getattr(problem, name)
        assert torch.equal(tensor, original)
        assert tensor.data_ptr() != original.data_ptr()
        assert tensor.stride() == original.stride()
        assert tensor.requires_grad is original.requires_grad


MORE = {OURS + RELU: 11.0, BATCHNORM + RELU: 22.0}


@pytest.fixture
def gpu(monkeypatch):
    """A function that puts a GPU there, with these times and this plan."""

    def set_up(times, *comparisons, **options):
        class Timer(FakeTimer):
            def __init__(self):
                super().__init__(times, **options)

            def environment(self):
                return ENVIRONMENT

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("cbn_ext.build_info", lambda: {"cuda_load_error": None})
        monkeypatch.setattr(report, "Timer", Timer)
        for name in ("comparisons", "sweep"):
            monkeypatch.setattr(plan, name, lambda: comparisons)

    return set_up


@pytest.mark.parametrize(("broken", "status"), [((), 0), ((BATCHNORM + RELU,), 0), ((OURS + RELU,), 1)])
def test_a_whole_run(gpu, capsys, tmp_path, broken, status):
    members = (*MEMBERS, (OURS + RELU, 4), (BATCHNORM + RELU, 1))
    gpu(TIMES | MORE, Comparison(SMALL, members, "plain"), broken=broken)
    assert report.run(100.0, tmp_path) == status
    output = capsys.readouterr().out
    for line in (
        "   0 s, 1 of 1, plain: 4x6x5x5 float32 contiguous",
        "forward+backward, cbn_ext / BatchNorm2d, float32",
        "wrote ",
        *(f"FAILED: {name}, 4x6x5x5 float32 contiguous: RuntimeError: {name} cannot be captured" for name in broken),
    ):
        assert line in output
    summary = (tmp_path / "cuda-some-gpu-9.md").read_text()
    assert "| 4x6x5x5 float32 contiguous | 60.0 | 30.0 | 0.50 | 0.50 | 0.50 | 0.50 |" in summary
    # What is printed last is what the files give again.
    lines = report.summary(tmp_path)
    assert lines[0].startswith("Some GPU 9, driver 555.1; ")
    assert "\n".join(lines[1:]) in output


def test_what_a_killed_run_leaves_is_all_but_its_last_comparison(gpu, monkeypatch, tmp_path):
    comparisons = [Comparison(replace(SMALL, shape=(4, 6, n, n)), MEMBERS[:2], "plain") for n in (5, 4, 3)]
    gpu(TIMES, *comparisons)
    results, left, right = tmp_path / "results", tmp_path / "left", measure.measure

    def measure_and_look(comparison, *arguments):
        if comparison is comparisons[2]:
            shutil.copytree(results, left)
        right(comparison, *arguments)

    monkeypatch.setattr(measure, "measure", measure_and_look)
    assert report.run(100.0, results) == 0
    names = {ending: f"cuda-some-gpu-9{ending}.csv" for ending in ("", "-memory", "-kernels")}
    assert {path.name for path in left.iterdir()} == set(names.values())
    shapes = ["4x6x5x5", "4x6x4x4"]
    for ending, row_type in (("", CudaRow), ("-memory", MemoryRow), ("-kernels", KernelRow)):
        rows = read_csv(left / names[ending], row_type)
        assert list(dict.fromkeys(row.shape for row in rows)) == shapes
        assert rows == read_csv(results / names[ending], row_type)[: len(rows)]
    lines = report.summary(left)
    assert len(lines) <= 60
    (target,) = (line for line in lines if line.startswith("forward+backward, cbn_ext / BatchNorm2d, float32"))
    assert target.split()[-4:] == ["0.50", "≤", "1", "met"]
    for shape in shapes:
        assert any(line.startswith(f"{shape} float32 contiguous  30.0  0.50") for line in lines)


def test_files_of_an_older_run_do_not_pass_for_this_one(gpu, tmp_path):
    (tmp_path / "cuda-some-gpu-9.csv").write_text("of an older run")
    (tmp_path / "cuda-some-gpu-9-sweep.csv").write_text("of an older sweep")
    gpu(TIMES, Comparison(SMALL, MEMBERS, "plain"), broken=tuple(TIMES))
    assert report.run(100.0, tmp_path) == 1
    assert {path.name for path in tmp_path.glob("*.csv")} == {"cuda-some-gpu-9-sweep.csv"}
    assert report.summary(tmp_path) == []


def test_a_sweep(gpu, monkeypatch, capsys, tmp_path):
    streaming, resident = "cbn_ext cluster=0 blocks=8", "cbn_ext cluster=8 threads=256"
    settings = {}

    def capture_and_look(self, workloads, cold, evaluation, capture=FakeTimer.capture):
        captured = capture(self, workloads, cold, evaluation)
        settings[captured[0]] = {k: v for k, v in os.environ.items() if k.startswith("CBN_CUDA")}
        assert evaluation is (captured[0] in (OURS, BATCHNORM))
        return captured

    monkeypatch.setattr(FakeTimer, "capture", capture_and_look)
    read = []
    monkeypatch.setattr(cbn_ext.ops, "read_cuda_environment", lambda: read.append(dict(os.environ)))
    members = ((OURS, 4), (BATCHNORM, 1), (streaming, 4), (resident, 4))
    times = {OURS: 10.0, BATCHNORM: 20.0, streaming: 8.0, resident: 16.0}
    gpu(times, *(Comparison(replace(SMALL, layout=layout), members, "sweep") for layout in plan.LAYOUTS))
    assert report.run(100.0, tmp_path, swept=True) == 0
    assert settings == {
        OURS: {},
        BATCHNORM: {},
        streaming: {"CBN_CUDA_CLUSTER": "0", "CBN_CUDA_BLOCKS": "8"},
        resident: {"CBN_CUDA_CLUSTER": "8", "CBN_CUDA_THREADS": "256"},
    }
    # Before and after each of two settings in each of two comparisons.
    assert [sum(name.startswith("CBN_CUDA") for name in each) for each in read] == [2, 0, 2, 0] * 2
    rows = read_csv(tmp_path / "cuda-some-gpu-9-sweep.csv", sweep.SweepRow)
    row = next(row for row in rows if (row.provider, row.l2, row.direction) == (streaming, "cold", BACKWARD))
    assert (row.cluster, row.blocks, row.threads) == (0, 8, None)
    assert (row.median_us, row.ratio_to_batchnorm, row.device_us, row.phase) == (16.0, 0.4, 8.0, "sweep")
    assert {(r.cluster, r.blocks, r.threads) for r in rows if r.provider == OURS} == {(None,) * 3}
    assert {path.name for path in tmp_path.iterdir()} == {"cuda-some-gpu-9-sweep.csv", "cuda-some-gpu-9-sweep.md"}
    assert report.summary(tmp_path) == []
    output = capsys.readouterr().out
    assert "Which path for which input: backward" in output


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
        report.run(1.0, tmp_path)
