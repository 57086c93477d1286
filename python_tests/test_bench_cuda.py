"""The CUDA benchmark without a GPU: its plan, budget, checks and rows, with a timer that is told the times."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from bench import cuda, cuda_compare, cuda_report, providers
from bench.compare import Comparison
from bench.cuda_compare import DeviceLostError, Failure, Measured, measure, rotated_steps
from bench.graphs import Environment
from bench.harness import BACKWARD, BOTH, EVALUATION, FORWARD
from bench.providers import (
    BATCHNORM,
    BATCHNORM_ADD_RELU,
    BATCHNORM_COMPILED,
    BATCHNORM_RELU,
    OURS,
    OURS_ADD_RELU,
    OURS_RELU,
    PROVIDERS,
    Case,
)
from bench.trace import Kernel

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


@pytest.mark.parametrize(("broken", "status"), [((), 0), ((BATCHNORM_RELU,), 0), ((OURS_RELU,), 1)])
def test_a_whole_run(monkeypatch, capsys, tmp_path, broken, status):
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
    assert cuda_report.run(100.0, tmp_path) == status
    output = capsys.readouterr().out
    for line in (
        "   0 s, 1 of 1: 4x6x5x5 float32 contiguous",
        "forward+backward, cbn_ext / BatchNorm2d, float32",
        "wrote ",
        *(f"FAILED: {name}, 4x6x5x5 float32 contiguous: RuntimeError: {name} cannot be captured" for name in broken),
    ):
        assert line in output
    summary = (tmp_path / "cuda-some-gpu-9.md").read_text()
    assert "| 4x6x5x5 float32 contiguous | 60.0 | 30.0 | 0.50 | 0.50 | 0.50 | 0.50 |" in summary


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
        cuda_report.run(1.0, tmp_path)
