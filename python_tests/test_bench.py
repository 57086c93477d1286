"""The benchmark's arithmetic, its probes, targets and files; no time is judged here."""

import csv
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import cpu, harness, providers
from bench.__main__ import RESULTS, main
from bench.compare import Comparison, compare
from bench.harness import BACKWARD, BOTH, DIRECTIONS, EVALUATION, FORWARD, MemoryRow, TimeRow
from bench.providers import (
    BATCHNORM,
    OURS,
    REFERENCE,
    REFERENCE_COMPILED,
    Case,
)
from bench.report import Target

ENVIRONMENT = cpu.Environment("Some CPU (R) 9 @ 2.0GHz", "AVX2", 2, "2.11.0", "0.1.0", "2026-01-31")


def time_row(**changes) -> TimeRow:
    row = TimeRow(OURS, "2x3x4x4", "float32", "contiguous", 4, "mixed", BOTH, 20.0, 18.0, 25.0, 7, 1.5, 2.0)
    return replace(row, **changes)


def memory_row(**changes) -> MemoryRow:
    return replace(MemoryRow(OURS, "2x3x4x4", "float32", "contiguous", 4, "mixed", 1000, 100, None), **changes)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([5.0], (5.0, 5.0, 5.0, 1)),
        ([9.0, 1.0, 11.0, 3.0, 7.0, 5.0], (6.0, 3.0, 9.0, 6)),
        ([10.0, 20.0], (15.0, 12.0, 18.0, 2)),
    ],
)
def test_summary_interpolates_percentiles_of_unordered_samples(samples, expected):
    summary = harness.summarize(samples)
    assert (summary.median, summary.p20, summary.p80, summary.samples) == pytest.approx(expected)


def test_summary_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        harness.summarize([])


@pytest.mark.parametrize(
    ("direction", "plain", "residual"), [(FORWARD, 2, 3), (BACKWARD, 3, 4), (BOTH, 5, 7), (EVALUATION, 2, 3)]
)
def test_gigabytes_per_second_counts_reads_and_writes_of_whole_tensors(direction, plain, residual):
    # 1 MB a millisecond is 1 GB/s.
    assert harness.gigabytes_per_second(direction, 10**6, 1000.0) == pytest.approx(plain)
    assert harness.gigabytes_per_second(direction, 10**6, 1000.0, residual=True) == pytest.approx(residual)


def test_wall_clock_adds_up_and_runs_the_directions_in_order():
    calls = []

    class Recorder:
        def forward(self):
            calls.append("forward")
            return "output"

        def backward(self, output):
            calls.append(f"backward of {output}")
            return ()

    times = harness.wall_clock(Recorder())
    assert calls == ["forward", "backward of output"]
    assert list(times) == list(DIRECTIONS)
    assert times[BOTH] == pytest.approx(times[FORWARD] + times[BACKWARD])


def fixed_time(microseconds: dict[str, float], calls: list[str]):
    """A measure that records who was called and takes what time it is told."""

    def measure(workload: str) -> dict[str, float]:
        calls.append(workload)
        return dict.fromkeys(DIRECTIONS, microseconds[workload])

    return measure


def test_interleaving_alternates_the_order_and_gives_slow_steps_whole_turns():
    calls = []
    measure = fixed_time({"a": 1e6, "b": 2e6}, calls)
    times = harness.time_interleaved({"a": "a", "b": "b"}, measure, turn_seconds=0.1, budget_seconds=1.0)
    assert calls == [*"ab", *"ab", *"ba", *"ab", *"ba"]  # one of each to learn the times, then four rounds
    assert times["b"][FORWARD] == harness.Summary(2e6, 2e6, 2e6, 4)


def test_interleaving_does_not_count_the_first_step_of_a_turn():
    calls = []
    measure = fixed_time({"a": 1e4, "b": 2e4}, calls)
    times = harness.time_interleaved({"a": "a", "b": "b"}, measure, turn_seconds=0.1, max_rounds=6)
    assert calls[2:19] == ["a"] * 11 + ["b"] * 6
    assert calls[19:36] == ["b"] * 6 + ["a"] * 11
    assert (times["a"][BOTH].samples, times["b"][BOTH].samples) == (6 * 10, 6 * 5)


KIB = 1024


def doubled(x: torch.Tensor) -> torch.Tensor:
    """A new tensor like x and no other allocation (a number as operand would allocate its own tensor)."""
    return torch.add(x, x)


def test_allocated_peak_counts_a_temporary_beside_the_result():
    x = torch.ones(64 * KIB)
    assert harness.allocated_peak(lambda: [doubled(doubled(x))]) == x.nbytes


def test_allocated_peak_is_the_largest_moment_not_the_sum():
    x = torch.ones(64 * KIB)

    def step():
        for _ in range(3):
            doubled(x)  # freed at once; the next one, and the result, may get the same address
        return [doubled(x)]

    assert harness.allocated_peak(step) == x.nbytes


def test_allocated_peak_counts_what_stays_alive_beside_the_result():
    x, kept = torch.ones(64 * KIB), []

    def step():
        kept.append(doubled(x))
        kept.append(doubled(x))
        return [doubled(x)]

    assert harness.allocated_peak(step) == 2 * x.nbytes


def test_allocated_peak_is_zero_for_an_op_that_allocates_its_result_only():
    x, older = torch.ones(64 * KIB), [torch.ones(64 * KIB)]

    def step():
        older.clear()  # frees what was there before the step: no credit for that
        return [doubled(x)]

    assert harness.allocated_peak(step) == 0


def test_allocated_peak_of_autograd_holds_what_is_saved():
    x = torch.ones(64 * KIB, requires_grad=True)
    grad = torch.ones(64 * KIB)

    def step():
        y = x.exp().sin()  # saves exp's result for both backwards
        return [y, *torch.autograd.grad(y, x, grad)]

    # At the peak exp(x), its cosine and the product of that with grad are alive.
    assert harness.allocated_peak(step) == 3 * x.nbytes


def test_resident_peak_sees_touched_memory():
    x = torch.ones(4 * KIB * KIB)  # 16 MiB
    growth = harness.resident_peak(lambda: [doubled(doubled(x))])
    assert growth is None or growth == pytest.approx(2 * x.nbytes, abs=KIB * KIB)


def test_csv_has_one_column_for_each_field_and_the_environment_in_every_row(tmp_path):
    path = tmp_path / "times.csv"
    harness.write_csv(path, [time_row(median_us=1.23456), time_row(provider=BATCHNORM, M=1)], ENVIRONMENT)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    case, machine = "provider shape dtype layout M data direction", "device isa threads torch cbn_ext date"
    times = "median_us p20_us p80_us samples gb_per_s ratio_to_batchnorm"
    assert list(rows[0]) == f"{case} {times} {machine}".split()
    assert rows[0]["median_us"] == "1.235"
    assert [row["provider"] for row in rows] == [OURS, BATCHNORM]
    assert {row["device"] for row in rows} == {ENVIRONMENT.device}


def test_csv_leaves_what_was_not_measured_empty(tmp_path):
    path = tmp_path / "memory.csv"
    harness.write_csv(path, [memory_row()], ENVIRONMENT)
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["beyond"], row["resident"]) == ("100", "")


def test_rows_and_environment_come_back_from_a_csv(tmp_path):
    path = tmp_path / "memory.csv"
    rows = [memory_row(resident=None), memory_row(resident=0, shape="9x9")]
    harness.write_csv(path, rows, ENVIRONMENT)
    assert harness.read_csv(path, MemoryRow) == rows
    assert harness.read_csv(path, cpu.Environment) == [ENVIRONMENT] * 2
    times = [time_row(median_us=1.5, ratio_to_batchnorm=None)]
    harness.write_csv(path, times, ENVIRONMENT)
    assert harness.read_csv(path, TimeRow) == times


def test_a_csv_that_could_not_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "memory.csv"
    harness.write_csv(path, [memory_row()], ENVIRONMENT)
    with pytest.raises(TypeError):
        harness.write_csv(path, [memory_row(beyond=7), None], ENVIRONMENT)
    assert harness.read_csv(path, MemoryRow) == [memory_row()]


SMALL = Case((4, 6, 5, 5))


def test_nothing_is_timed_after_a_wrong_result(monkeypatch):
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    timed = []
    monkeypatch.setattr(nn, "BatchNorm2d", Shifted)
    monkeypatch.setattr("bench.compare.time_interleaved", timed.append)
    with pytest.raises(providers.WrongResultError, match="BatchNorm2d"):
        compare(Comparison(SMALL, ((BATCHNORM, 1),)))
    assert not timed


def test_a_comparison_needs_the_batch_norm_it_relates_to():
    with pytest.raises(ValueError, match="expected BatchNorm2d among the members"):
        Comparison(SMALL, ((OURS, 4),))


def test_comparison_gives_a_row_for_each_member_and_direction(monkeypatch):
    def three_steps(workloads):
        microseconds = {OURS: 30.0, BATCHNORM: 10.0}
        return {key: {d: harness.Summary(microseconds[key[0]], 9.0, 40.0, 3) for d in DIRECTIONS} for key in workloads}

    monkeypatch.setattr("bench.compare.time_interleaved", three_steps)
    times, memory = compare(Comparison(SMALL, ((OURS, 4), (BATCHNORM, 1))))
    assert [(row.provider, row.M, row.direction) for row in times] == [
        (provider, m, d) for provider, m in ((OURS, 4), (BATCHNORM, 1)) for d in DIRECTIONS
    ]
    assert {row.ratio_to_batchnorm for row in times if row.provider == OURS} == {3.0}
    tensor_bytes = 4 * 6 * 5 * 5 * 4
    assert times[0].gb_per_s == pytest.approx(2 * tensor_bytes / 30e3)
    assert [row.in_out for row in memory] == [4 * tensor_bytes] * 2
    # Statistics and gradients of the parameters at least; no more than one tensor like the input beside them.
    assert 4 * 6 * 4 <= memory[1].beyond < 1.5 * tensor_bytes


def test_targets_take_geometric_means_over_shapes_of_mixed_forward_and_backward():
    members = {(OURS, 4): 4.0, (OURS, 1): 2.0, (BATCHNORM, 1): 2.0}
    members |= {(REFERENCE, 4): 40.0, (REFERENCE_COMPILED, 4): 36.0}
    times, memory = [], []
    for shape, factor in (("a", 1.0), ("b", 4.0)):
        for layout in ("contiguous", "channels_last"):
            for (provider, m), median in members.items():
                # On shape b ours with M=4 is four times slower against the others.
                slower = factor if (provider, m) == (OURS, 4) else 1.0
                row = time_row(provider=provider, M=m, shape=shape, layout=layout, median_us=median * slower)
                times += [
                    row,
                    replace(row, data="constant", median_us=1e9),
                    replace(row, direction=FORWARD, median_us=7.0),
                ]
    for shape, resident in (("a", None), ("b", 500)):
        memory.append(memory_row(shape=shape, beyond=150, resident=resident))
        memory.append(memory_row(provider=BATCHNORM, M=1, shape=shape, beyond=100, resident=resident and 0))
    values = {target.what: (target.value, target.met) for target in cpu.targets(times, memory)}
    memory_what = "peak memory, cbn_ext M=4 / BatchNorm2d, worst shape and layout: "
    assert values == {
        "time, cbn_ext M=4 / BatchNorm2d, contiguous": (pytest.approx(4.0), False),
        "time, cbn_ext M=4 / BatchNorm2d, channels_last": (pytest.approx(4.0), False),
        "time, cbn_ext M=1 / BatchNorm2d, contiguous": (pytest.approx(1.0), True),
        "time, cbn_ext M=1 / BatchNorm2d, channels_last": (pytest.approx(1.0), True),
        "time, reference / cbn_ext, M=4": (pytest.approx(5.0), False),
        "time, reference compiled / cbn_ext, M=4": (pytest.approx(4.5), False),
        memory_what + "allocated beyond input and output": (pytest.approx(1.5), False),
        memory_what + "allocated in all": (pytest.approx(1150 / 1100), True),
        memory_what + "resident in all": (pytest.approx(1.5), False),
    }


@pytest.mark.parametrize(
    ("value", "relation", "met"), [(3.0, "≤", True), (3.1, "≤", False), (3.0, "≥", True), (2.9, "≥", False)]
)
def test_a_target_is_met_at_its_limit(value, relation, met):
    assert Target("something", value, relation, 3.0).met is met


def test_report_writes_files_named_after_the_machine(tmp_path):
    members = ((OURS, 4), (BATCHNORM, 1), (OURS, 1), (REFERENCE, 4), (REFERENCE_COMPILED, 4))
    times = [
        time_row(provider=provider, M=m, layout=layout, direction=direction)
        for layout in ("contiguous", "channels_last")
        for provider, m in members
        for direction in DIRECTIONS
    ]
    memory = [memory_row(resident=None), memory_row(provider=BATCHNORM, M=1)]
    cpu.report(ENVIRONMENT, 0.7, times, memory).write(tmp_path / "results")
    name = "cpu-some-cpu-r-9-2-0ghz"
    written = {path.name: path for path in (tmp_path / "results").iterdir()}
    assert set(written) == {name + ending for ending in (".csv", "-memory.csv", ".md", ".png")}
    summary = written[name + ".md"].read_text()
    assert "Some CPU (R) 9 @ 2.0GHz, AVX2, 2 threads; torch 2.11.0, cbn_ext 0.1.0; 2026-01-31; load" in summary
    assert "- The load average before the run was 0.7: other processes disturb these times." in summary
    assert "| time, reference / cbn_ext, M=4 | 1.00 | ≥ 15 | missed |" in summary
    cells = ["2x3x4x4 float32 channels_last", BATCHNORM, "1", *["20 (18-25)"] * 3, "1.50", "2.00"]
    assert f"| {' | '.join(cells)} |" in summary
    assert f"]({name}.png)" in summary
    assert written[name + ".png"].read_bytes().startswith(b"\x89PNG")


def test_a_target_that_was_not_measured_says_so():
    target = Target("speed", None, "≤", 3.0)
    assert target.cells == ["speed", "", "≤ 3", "not measured"]
    assert not target.met


@pytest.mark.parametrize(
    ("command", "part", "arguments"),
    [
        ("cuda --seconds 90", "cuda_report", (90.0, RESULTS, False)),
        ("cuda --sweep", "cuda_report", (280, RESULTS, True)),
        ("network --device cpu --seconds 5", "network", ("cpu", 5.0, RESULTS)),
        ("sass", "sass", (None, RESULTS)),
    ],
)
def test_a_command_runs_its_part_alone(monkeypatch, command, part, arguments):
    called = []
    for name in ("cpu", "cuda_report", "network", "sass"):
        monkeypatch.setattr(f"bench.{name}.run", lambda *given, name=name: called.append((name, given)))
    monkeypatch.setattr("sys.argv", ["bench", *command.split()])
    with nullcontext() if part == "sass" else pytest.raises(SystemExit):
        main()
    assert called == [(part, arguments)]


def test_environment_tells_the_machine():
    environment = cpu.environment()
    assert environment.device
    assert environment.torch == torch.__version__
    assert environment.threads == torch.get_num_threads()
