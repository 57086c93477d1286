"""The benchmark's arithmetic, its probes and its check of results; no time is judged here."""

import csv
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import cpu, harness, providers
from bench.compare import Comparison, compare
from bench.harness import BACKWARD, BOTH, DIRECTIONS, EVALUATION, FORWARD, MemoryRow, TimeRow
from bench.providers import (
    ADD_RELU,
    BATCHNORM,
    BATCHNORM_ADD_RELU,
    BATCHNORM_RELU,
    OURS,
    OURS_ADD_RELU,
    OURS_RELU,
    PROVIDERS,
    REFERENCE,
    REFERENCE_COMPILED,
    RELU,
    Case,
)
from bench.report import Target
from cbn_ext import reference

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


SMALL = Case((4, 6, 5, 5))


def posterior(case: Case) -> torch.Tensor:
    problem = providers.make_problem(case)
    running = (problem.state[f"running_{name}"] for name in ("prior", "mean", "var"))
    return reference.responsibilities(problem.x.detach(), None, *running, providers.EPS, "channel")


def test_mixed_data_shares_the_responsibility_between_all_components():
    p = posterior(Case((32, 16, 16, 16)))
    shares = p.mean((1, 3, 4))
    assert 0.1 < shares.min() <= shares.max() < 0.45
    assert p.amax(0).mean() < 0.75


def test_saturated_data_gives_each_value_to_one_component_and_every_component_some():
    p = posterior(Case((32, 16, 16, 16), data="saturated"))
    assert p.amax(0).mean() > 0.999
    assert p.mean((1, 3, 4)).min() > 0.2


def test_constant_data_has_every_other_channel_constant():
    x = providers.make_problem(replace(SMALL, data="constant")).x.detach()
    assert (x.amax((0, 2, 3)) == x.amin((0, 2, 3))).tolist() == [True, False] * 3


@pytest.mark.parametrize("data", ["mixed", "saturated", "constant"])
def test_problems_are_repeatable_and_x_the_same_for_any_number_of_components(data):
    case = replace(SMALL, data=data)
    first, again, one = (providers.make_problem(replace(case, components=m)) for m in (4, 4, 1))
    assert all(torch.equal(first.state[name], again.state[name]) for name in first.state)
    assert torch.equal(first.x, one.x)
    assert torch.equal(first.grad_output, one.grad_output)


def test_channels_last_problems_are_channels_last():
    problem = providers.make_problem(replace(SMALL, layout="channels_last"))
    for tensor in (problem.x, problem.grad_output):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_unknown_data_and_provider_are_named():
    with pytest.raises(ValueError, match="got 'smooth'"):
        providers.make_problem(replace(SMALL, data="smooth"))
    with pytest.raises(ValueError, match="unknown provider 'GroupNorm'"):
        providers.set_up("GroupNorm", providers.make_problem(SMALL))
    with pytest.raises(ValueError, match="expected one component for BatchNorm2d, got 4"):
        providers.set_up(BATCHNORM, providers.make_problem(SMALL))


@pytest.mark.parametrize("provider", [name for name, provider in PROVIDERS.items() if provider.compiled])
def test_compiled_providers_are_compiled(provider):
    components = 4 if provider == REFERENCE_COMPILED else 1
    problem = providers.make_problem(replace(SMALL, components=components))
    assert isinstance(providers.set_up(provider, problem).layer, torch._dynamo.OptimizedModule)


@pytest.mark.parametrize("data", ["mixed", "saturated", "constant"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("provider", "components"),
    [
        (OURS, 4),
        (OURS, 1),
        (OURS_RELU, 4),
        (OURS_ADD_RELU, 4),
        (BATCHNORM, 1),
        (BATCHNORM_RELU, 1),
        (BATCHNORM_ADD_RELU, 1),
        (REFERENCE, 4),
    ],
)
def test_every_provider_passes_the_check_and_keeps_its_running_statistics(provider, components, layout, data):
    problem = providers.make_problem(replace(SMALL, components=components, layout=layout, data=data))
    workload = providers.set_up(provider, problem)
    operation = workload.provider.operation
    providers.check(provider, problem.case, [workload.evaluate()], [providers.expected_evaluation(problem, operation)])
    assert workload.layer.training
    actual = providers.results(workload)
    expected = providers.expected_results(problem, operation, actual[0])
    assert len(actual) == len(expected) == (5 if operation == ADD_RELU else 4)
    providers.check(provider, problem.case, actual, expected, operation)
    kept = workload.layer.running_mean.reshape(components, -1)
    torch.testing.assert_close(kept, problem.state["running_mean"], rtol=1e-4, atol=1e-4)


def test_expected_results_do_not_depend_on_the_blocks():
    problem = providers.make_problem(SMALL)
    output = torch.randn_like(problem.x)
    for operation in providers.OPERATIONS:
        whole, blocks = (providers.expected_results(problem, operation, output, n) for n in (10**6, 200))
        for one, other in zip(whole, blocks, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_results_of_some_channels_are_those_of_all():
    problem, channels = providers.make_problem(SMALL), torch.tensor([0, 3, 5])
    whole, some = providers.expected_results(problem), providers.expected_results(providers.part_of(problem, channels))
    for one, other in zip(whole, some, strict=True):
        torch.testing.assert_close(one[:, channels], other, rtol=1e-12, atol=1e-12)


def test_the_path_is_chosen_for_forward_and_backward_alone(monkeypatch):
    seen = []

    class Watcher(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(os.environ.get("CBN_CUDA_CLUSTER"))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(os.environ.get("CBN_CUDA_CLUSTER"))
            return grad

    monkeypatch.delenv("CBN_CUDA_CLUSTER", raising=False)
    workload = providers.set_up(providers.STREAMING, providers.make_problem(SMALL))
    monkeypatch.setattr(workload.layer, "forward", lambda x: Watcher.apply(x) * workload.layer.weight.sum())
    workload.layer.bias = workload.layer.weight
    workload.backward(workload.forward())
    assert seen == ["0", "0"]
    assert "CBN_CUDA_CLUSTER" not in os.environ


@pytest.mark.parametrize(
    ("output", "grad", "message"),
    [
        (1.001, 1.0, r"y differs from the float64 reference by 0\.001 of its norm, expected at most 0\.0001"),
        (1.0, 0.98, r"grad x differs from the float64 reference by 0\.02 of its norm"),
        (float("nan"), 1.0, r"y differs from the float64 reference by nan"),
    ],
)
def test_wrong_results_are_named_with_their_error(output, grad, message):
    problem = providers.make_problem(SMALL)
    y, grad_x, *others = expected = providers.expected_results(problem)
    with pytest.raises(providers.WrongResultError, match="mine, shape 4x6x5x5.*" + message):
        providers.check("mine", problem.case, [y * output, grad_x * grad, *others], expected)


def test_gradients_behind_a_relu_may_differ_in_an_element_of_many():
    problem = providers.make_problem(SMALL)
    y, grad_x, *others = expected = providers.expected_results(problem)
    actual = [y, grad_x * 1.004, *others]
    with pytest.raises(providers.WrongResultError, match="grad x"):
        providers.check("mine", problem.case, actual, expected)
    providers.check("mine", problem.case, actual, expected, RELU)
    with pytest.raises(providers.WrongResultError, match=r"grad x .* by 0\.006 of its norm"):
        providers.check("mine", problem.case, [y, grad_x * 1.006, *others], expected, RELU)
    with pytest.raises(providers.WrongResultError, match="y differs"):
        providers.check("mine", problem.case, [y * 1.004, grad_x, *others], expected, RELU)


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


def test_environment_tells_the_machine():
    environment = cpu.environment()
    assert environment.device
    assert environment.torch == torch.__version__
    assert environment.threads == torch.get_num_threads()
