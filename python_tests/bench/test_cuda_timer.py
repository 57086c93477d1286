"""What the CUDA benchmark's timer makes of what the device says: steps, times, kernels and bytes; without a GPU."""

from contextlib import contextmanager

import pytest
import torch

from bench.cuda.timer import (
    Kernel,
    distinct_bytes,
    kernels_by_direction,
    listed,
    run_steps,
    short_name,
    step_times,
    summed,
)
from bench.harness import BACKWARD, BOTH, EVALUATION, FORWARD


class Workload:
    """Says what it does, and when its results die."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def result(self, what: str):
        log = self.log

        class Result:
            def __del__(self):
                log.append(f"free {what}")

        log.append(what)
        return Result()

    def forward(self):
        return self.result(f"y{self.name}")

    def backward(self, output):
        return self.result(f"dx{self.name}")

    def evaluate(self):
        return self.result(f"e{self.name}")


def log_of(cold: bool, evaluation: bool) -> list[str]:
    """What happens inside and between the graphs of two steps."""
    log = []

    @contextmanager
    def graph():
        log.append("graph")
        yield
        log.append("end")

    run_steps([Workload(log, "1"), Workload(log, "2")], cold, evaluation, graph)
    return log


@pytest.mark.parametrize("evaluation", [True, False])
def test_cold_steps_keep_what_they_made_until_all_is_captured(evaluation):
    log = log_of(True, evaluation)
    frees = [line for line in log if line.startswith("free")]
    captured = ["graph", "y1", "y2", "end", "graph", "dx1", "dx2", "end", "graph", "e1", "e2", "end"]
    assert log[: -len(frees)] == captured[: None if evaluation else 8]
    assert sorted(frees) == sorted(f"free {line}" for line in log if line[-1] in "12" and line not in frees)


@pytest.mark.parametrize("evaluation", [True, False])
def test_hot_steps_leave_their_memory_to_the_next(evaluation):
    assert log_of(False, evaluation) == [
        *("graph", "y1", "free y1", "y2", "free y2", "end", "graph"),
        *("y1", "dx1", "free y1", "free dx1", "y2", "dx2", "free y2", "free dx2", "end"),
        *(("graph", "e1", "free e1", "e2", "free e2", "end") if evaluation else ()),
    ]


@pytest.mark.parametrize(("cold", "backward", "both"), [(True, 2000.0, 2500.0), (False, 1500.0, 2000.0)])
def test_times_are_of_one_step(cold, backward, both):
    times = {FORWARD: 500.0, BACKWARD: backward, BOTH: both}
    assert step_times([1.0, 4.0], 2, cold) == times
    assert step_times([1.0, 4.0, 0.5], 2, cold) == times | {EVALUATION: 250.0}


SPIN = ("spin_kernel(long)", 500.0)


def test_kernels_belong_to_the_replays_they_follow():
    trace = [entry for number in range(5) for entry in (SPIN, (f"kernel {number}", 6.0))]
    assert kernels_by_direction(trace, [(3, 2), (2, 3)]) == [
        {
            FORWARD: [Kernel("kernel 0", 0.5, 3.0)],
            BACKWARD: [Kernel("kernel 1", 0.5, 3.0)],
            EVALUATION: [Kernel("kernel 2", 0.5, 3.0)],
        },
        {FORWARD: [Kernel("kernel 3", 1 / 3, 2.0)], BACKWARD: [Kernel("kernel 4", 1 / 3, 2.0)]},
    ]


def test_a_trace_that_lost_replays_is_an_error():
    with pytest.raises(RuntimeError, match="expected the trace of 3 replays, got that of 1"):
        kernels_by_direction([SPIN, ("kernel", 6.0)], [(3, 2)])


def test_memory_of_what_is_returned_twice_counts_once():
    first, second = torch.zeros(16), torch.zeros(8)
    # A residual's gradient may be that of the output.
    assert distinct_bytes([first, second, first]) == 64 + 32


def test_replays_are_told_apart_by_the_marker_and_may_be_empty():
    trace = [("before", 1.0), SPIN, ("a", 1.0), ("b", 2.0), SPIN]
    assert kernels_by_direction(trace, [(2, 1)]) == [
        {FORWARD: [Kernel("a", 1, 1.0), Kernel("b", 1, 2.0)], BACKWARD: []}
    ]


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
