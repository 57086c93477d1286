"""The benchmark's arithmetic and its probes; no time is judged here."""

import pytest
import torch

from bench import harness
from bench.harness import BACKWARD, BOTH, DIRECTIONS, EVALUATION, FORWARD


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
    assert tuple(vars(summary).values()) == pytest.approx(expected)


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
