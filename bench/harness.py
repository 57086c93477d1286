"""What every benchmark shares: interleaved timing, peak memory, throughput by one byte formula, and rows of results.

Nothing here knows what is measured: a workload is anything that can be timed, by default what has `forward()` and
`backward(output)`.
"""

import ctypes
import gc
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cases import case_label

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "forward+backward")
EVALUATION = "evaluation forward"

#: Tensors of the input's size that a direction must move, whoever computes it: x, y; x, grad_y, grad_x; all.
TENSORS_MOVED = {FORWARD: 2, BACKWARD: 3, BOTH: 5, EVALUATION: 2}
#: What an added residual must move besides: itself, its gradient, both.
RESIDUALS_MOVED = {FORWARD: 1, BACKWARD: 1, BOTH: 2, EVALUATION: 1}

Key = TypeVar("Key", bound=Hashable)
Workload = TypeVar("Workload")


@dataclass(frozen=True)
class Row:
    """The columns with which every row begins: a provider and the labels of a case."""

    provider: str
    shape: str
    dtype: str
    layout: str
    M: int
    data: str

    @property
    def member(self) -> tuple[str, int]:
        """The member of a comparison."""
        return self.provider, self.M

    @property
    def case(self) -> tuple[str, str, str]:
        """Shape, dtype and layout."""
        return self.shape, self.dtype, self.layout

    @property
    def label(self) -> str:
        """The case in a line of text."""
        return case_label(*self.case, self.data)


@dataclass(frozen=True)
class TimeRow(Row):
    """Time in one direction.

    The ratio is that of the medians, to nn.BatchNorm2d followed by the same operations; None where that failed.
    """

    direction: str
    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    gb_per_s: float
    ratio_to_batchnorm: float | None


@dataclass(frozen=True)
class MemoryRow(Row):
    """Peak memory of one forward+backward step, in bytes.

    in_out: input, output and their gradients. beyond: the allocator's peak on top of those. resident: the peak of
    touched memory on top of those (`resident_peak`), None where it cannot be measured.
    """

    in_out: int
    beyond: int
    resident: int | None


@dataclass(frozen=True)
class Summary:
    """Microseconds a call."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int


def summarize(samples: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile, interpolated linearly between the samples."""
    if not samples:
        raise ValueError("expected at least one sample, got none")
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return Summary(*torch.quantile(torch.tensor(samples, dtype=torch.float64), levels).tolist(), len(samples))


def gigabytes_per_second(direction: str, tensor_bytes: int, microseconds: float, residual: bool = False) -> float:
    """Throughput by one formula for every provider; `tensor_bytes` is the size of the input.

    The signs that a ReLU's backward needs are not counted: they follow from x, or take a bit an element.
    """
    tensors = TENSORS_MOVED[direction] + (RESIDUALS_MOVED[direction] if residual else 0)
    return tensors * tensor_bytes / (microseconds * 1e3)


def wall_clock(workload: Any) -> dict[str, float]:
    """Microseconds of one step in each direction. For the CPU, where a call returns when its work is done."""
    start = time.perf_counter_ns()
    output = workload.forward()
    middle = time.perf_counter_ns()
    # The gradients live until after the last reading, so that freeing them is not timed.
    gradients = workload.backward(output)
    end = time.perf_counter_ns()
    del output, gradients
    return dict(zip(DIRECTIONS, ((middle - start) / 1e3, (end - middle) / 1e3, (end - start) / 1e3), strict=True))


def time_interleaved(
    workloads: dict[Key, Workload],
    measure: Callable[[Workload], dict[str, float]] = wall_clock,
    turn_seconds: float = 0.15,
    budget_seconds: float = 25.0,
    max_rounds: int = 16,
) -> dict[Key, dict[str, Summary]]:
    """Time every workload in every direction, so that a slow moment of the machine meets all of them alike.

    In each round every workload has one turn of about `turn_seconds`, at least one step; every other round
    goes in the reverse order. A turn's first step only refills the caches that the one before emptied, and is
    not counted, unless the step is so long that it is the turn. Rounds are as many as fit in the budget, an
    even number from 4 to `max_rounds`.

    Args:
        workloads: warmed up: each has run once, so that what compiles has compiled.
        measure: microseconds of one step by direction. What measures many steps at once, and gives their mean,
            wants the seconds of a turn and of all divided by as many.
    """
    steps, round_seconds = {}, 0.0
    for key, workload in workloads.items():
        seconds = measure(workload)[BOTH] / 1e6
        steps[key] = max(1, min(50, int(turn_seconds / seconds)))
        round_seconds += seconds * steps[key]
    rounds = 2 * max(2, min(max_rounds, int(budget_seconds / round_seconds)) // 2)

    samples = {key: defaultdict(list) for key in workloads}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for key in list(workloads) if number % 2 == 0 else reversed(workloads):
                if steps[key] > 1:
                    measure(workloads[key])
                for _ in range(steps[key]):
                    for direction, microseconds in measure(workloads[key]).items():
                        samples[key][direction].append(microseconds)
    finally:
        if collecting:
            gc.enable()
    return {key: {d: summarize(s) for d, s in by_direction.items()} for key, by_direction in samples.items()}


def allocated_peak(step: Callable[[], Sequence[Tensor]]) -> int:
    """Peak bytes that `step` holds in PyTorch's CPU allocator beyond the tensors it returns.

    What existed before `step` is not counted. The peak is taken over the profiler's record of every
    allocation, so a tensor that lives for an instant counts. Memory that C++ code takes past PyTorch's
    allocator is not in the record: `resident_peak` sees it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        results = step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    changes = [(e["args"]["Addr"], e["args"]["Bytes"]) for e in events if e["args"]["Device Type"] == 0]

    returned = {tensor.untyped_storage().data_ptr() for tensor in results}
    # An address can be taken several times; what is returned is what was put there last.
    last = {address: index for index, (address, size) in enumerate(changes) if size > 0}
    excluded = {last[address] for address in returned if address in last}
    live, held, peak = set(), 0, 0
    for index, (address, size) in enumerate(changes):
        if size > 0 and index not in excluded:
            live.add(address)
            held += size
            peak = max(peak, held)
        elif address in live:
            # Frees of what was there before `step` are passed over.
            live.remove(address)
            held += size
    return peak


def resident_peak(step: Callable[[], Sequence[Tensor]]) -> int | None:
    """Peak growth of the process's resident memory during `step`, in bytes; None but on Linux with glibc.

    Counts whatever takes memory, in whole pages, but only what was touched. Among many temporaries it exceeds
    `allocated_peak`: what was freed meanwhile has not all gone back to the system.
    """
    try:
        # What was freed before would be taken again without growth.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    except (AttributeError, OSError, TypeError):
        return None
    before = _status_bytes("VmRSS")
    results = step()
    peak = _status_bytes("VmHWM")
    del results
    return peak - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"expected {key} in /proc/self/status")
