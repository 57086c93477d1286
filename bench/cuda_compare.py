"""One comparison on a GPU: its members set up, checked, weighed, captured, timed side by side and traced."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.compare import Comparison
from bench.harness import BACKWARD, BOTH, FORWARD, MemoryRow, Summary, TimeRow, gigabytes_per_second, time_interleaved
from bench.providers import (
    ADD_RELU,
    NORM,
    PROVIDERS,
    Case,
    LayerWorkload,
    Problem,
    check,
    cuda_settings,
    expected_evaluation,
    expected_results,
    make_problem,
    part_of,
    results,
    set_up,
)
from bench.trace import Kernel, listed

#: Bytes of x and y over all steps of a graph, so that its replay takes a fifth of a millisecond or more ...
_GRAPH_BYTES = 8 * 10**8
#: ... but steps that only wait for launches need not be more than these.
_MOST_STEPS = 128
_HOT_STEPS = 50
#: Steps of an eager measurement, which are queued without waiting for the device.
_EAGER_STEPS = 100
#: Elements of those channels whose results are compared with the reference.
_CHECKED_ELEMENTS = 2**23


@dataclass(frozen=True)
class CudaRow(TimeRow):
    """Time of one provider in graph replay, or of an eager step by the wall clock.

    phase: of the comparison, in which the ratio was taken. l2: "cold", every step has tensors of its own, "hot", all
    steps share theirs, or "eager". copy_percent: gb_per_s of what a copy moves. device_us: time of the kernels alone,
    by the profiler; kernels: their names; both for cold ones only.
    """

    phase: str
    l2: str
    copy_percent: float
    device_us: float | None
    kernels: str


@dataclass(frozen=True)
class KernelRow:
    """One kernel of one provider, L2 cold: calls, and microseconds on the device, both of one step."""

    provider: str
    shape: str
    dtype: str
    layout: str
    M: int
    data: str
    direction: str
    kernel: str
    calls: float
    device_us: float


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and why. ours: for this package to mend."""

    what: str
    where: str
    error: str
    ours: bool

    @classmethod
    def of(cls, what: str, case: Case, error: Exception, ours: bool) -> "Failure":
        """What an error has to say in its first line."""
        first_line = next(iter(str(error).splitlines()), "")
        return cls(what, label(case), f"{type(error).__name__}: {first_line}", ours)


@dataclass
class Measured:
    """What has been found out so far; memory and kernels of what several phases measure are those of the first.

    left_out: by phase, the cases that the time did not suffice for.
    """

    times: list[CudaRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def warnings(self) -> list[str]:
        """What is missing, and why."""
        return [f"FAILED: {f.what}, {f.where}: {f.error}" for f in self.failures] + [
            f"Left out of {phase}, the time was over ({len(cases)}): {'; '.join(cases)}"
            for phase, cases in self.left_out.items()
        ]


class DeviceLostError(RuntimeError):
    """The device answers nothing more within this process."""


class Timer(Protocol):
    """What `bench.graphs.Timer` does on a GPU."""

    cache_bytes: int

    def peak_memory(self, step: Callable[[], Sequence[Tensor]]) -> int: ...
    def capture(self, workloads: Sequence[LayerWorkload], cold: bool, evaluation: bool) -> Any: ...
    def measure(self, captured: Any) -> dict[str, float]: ...
    def kernels(self, captured: Sequence[Any]) -> list[dict[str, list[Kernel]]]: ...
    def synchronize(self) -> None: ...
    def release(self) -> None: ...


def label(case: Case) -> str:
    """The case in a line of text."""
    shape, dtype, layout, _, data = case.labels.values()
    return " ".join([shape, dtype, layout, *([data] if data != "mixed" else [])])


def rotated_steps(case: Case, cache_bytes: int) -> int:
    """Steps of a graph, each with tensors of its own: together at least three times the L2 cache."""
    of_step = 2 * case.tensor_bytes
    return max(ceil(3 * cache_bytes / of_step), min(_MOST_STEPS, ceil(_GRAPH_BYTES / of_step)))


def measure(comparison: Comparison, timer: Timer, copy_gb_per_s: float, found: Measured) -> None:
    """Add what is found about the members of a comparison to `found`; a member that fails is left out of the rest.

    Raises:
        DeviceLostError: an error after which nothing more can be measured.
    """
    # A compiler that met too many shapes would fall back to eager execution.
    torch.compiler.reset()
    case = comparison.case
    cold, hot, device = {}, {}, {}
    weighed = {_member(row) for row in found.memory}
    traced = {_member(row) for row in found.kernels}

    def failed(what: str, error: Exception, ours: bool) -> None:
        failure = Failure.of(what, case, error, ours)
        found.failures.append(failure)
        try:
            timer.synchronize()
        except Exception as sticky:
            raise DeviceLostError(f"{what}, {failure.where}: {failure.error}") from sticky

    timer.release()
    problems = {m: make_problem(replace(case, components=m)) for m in {m: None for _, m in comparison.members}}
    copies = [_tensors(problems[1]) for _ in range(rotated_steps(case, timer.cache_bytes))]
    checked = _Check()
    for member in comparison.members:
        name, components = member
        try:
            workload = set_up(name, problems[components])
            provider = workload.provider
            # One more compilation, for which the time is too dear; settings are compared in training alone, and in
            # evaluation there are no groups.
            evaluation = not (provider.compiled or provider.settings or provider.split)
            with cuda_settings(provider.settings):
                checked(name, workload, evaluation)
                memory = _memory(name, workload, timer)
                steps = [replace(workload, problem=replace(workload.problem, **tensors)) for tensors in copies]
                cold[member] = timer.capture(steps, True, evaluation)
                if 5 * case.tensor_bytes <= timer.cache_bytes:
                    hot[member] = timer.capture(steps[:1] * _HOT_STEPS, False, evaluation)
            if _member(memory) not in weighed:
                found.memory.append(memory)
        except Exception as error:
            cold.pop(member, None)
            failed(name, error, PROVIDERS[name].layer == "cbn_ext")
    try:
        device = dict(zip(cold, timer.kernels(list(cold.values())), strict=True))
    except Exception as error:
        failed("the profiler", error, False)
    try:
        if cold:
            times = _times(cold, timer.measure, len(copies))
            found.times += _time_rows(comparison, times, "cold", device, copy_gb_per_s)
        if hot:
            times = _times(hot, timer.measure, _HOT_STEPS)
            found.times += _time_rows(comparison, times, "hot", {}, copy_gb_per_s)
    except Exception as error:
        failed("the timing", error, False)
    found.kernels += [row for row in _kernel_rows(case, device) if _member(row) not in traced]


def measure_eager(comparison: Comparison, timer: Timer, copy_gb_per_s: float, found: Measured) -> None:
    """Add the wall-clock times of eager steps, forward+backward, many of them queued before the device is waited for.

    For inputs so small that the device waits for the host.
    """
    case = comparison.case

    def wall_clock(workload: LayerWorkload) -> dict[str, float]:
        start = time.perf_counter_ns()
        for _ in range(_EAGER_STEPS):
            workload.backward(workload.forward())
        timer.synchronize()
        return {BOTH: (time.perf_counter_ns() - start) / 1e3 / _EAGER_STEPS}

    workloads = {(name, m): set_up(name, make_problem(replace(case, components=m))) for name, m in comparison.members}
    times = _times(workloads, wall_clock, _EAGER_STEPS, budget=1.0)
    found.times += _time_rows(comparison, times, "eager", {}, copy_gb_per_s)


def _member(row: MemoryRow | KernelRow) -> tuple[str | int, ...]:
    return row.provider, row.shape, row.dtype, row.layout, row.M, row.data


def _tensors(problem: Problem) -> dict[str, Tensor]:
    return {
        "x": problem.x.detach().clone().requires_grad_(),
        "grad_output": problem.grad_output.clone(),
        "residual": problem.residual.detach().clone().requires_grad_(),
    }


class _Check:
    """Compares a provider's step and evaluation with the reference, in some of the channels, first and last among them.

    Results that do not depend on the provider are kept for the next one.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], Sequence[Tensor]] = {}

    def __call__(self, name: str, workload: LayerWorkload, evaluation: bool) -> None:
        problem, operation = workload.problem, workload.provider.operation
        case = problem.case
        width = max(1, _CHECKED_ELEMENTS * case.shape[1] // problem.x.numel())
        channels = torch.linspace(0, case.shape[1] - 1, min(width, case.shape[1]), device=problem.x.device).long()
        part = part_of(problem, channels)
        if evaluation:  # before a step moves the running statistics
            y = workload.evaluate()[:, channels]
            check(f"{name} in evaluation", case, [y], [expected_evaluation(part, operation)])
        actual = [result[:, channels] for result in results(workload)]
        key = case.components, workload.provider.split
        if operation == NORM and key not in self._kept:
            groups = problem.groups if workload.provider.split else None
            self._kept[key] = expected_results(part, block_elements=_CHECKED_ELEMENTS, groups=groups)
        if operation == NORM:
            expected = self._kept[key]
        else:
            expected = expected_results(part, operation, actual[0], block_elements=_CHECKED_ELEMENTS)
        check(name, case, actual, expected, operation)


def _memory(name: str, workload: LayerWorkload, timer: Timer) -> MemoryRow:
    def step() -> Sequence[Tensor]:
        output = workload.forward()
        return output.detach(), *(gradient for gradient in workload.backward(output) if gradient.dim() == 4)

    case = workload.problem.case
    tensors = 6 if workload.provider.operation == ADD_RELU else 4
    return MemoryRow(
        provider=name,
        **case.labels,
        in_out=tensors * case.tensor_bytes,
        beyond=timer.peak_memory(step),
        resident=None,
    )


def _kernel_rows(case: Case, device: dict[tuple[str, int], dict[str, list[Kernel]]]) -> list[KernelRow]:
    return [
        KernelRow(
            name,
            **replace(case, components=components).labels,
            direction=direction,
            kernel=kernel.name,
            calls=kernel.calls,
            device_us=kernel.microseconds,
        )
        for (name, components), by_direction in device.items()
        for direction, kernels in by_direction.items()
        for kernel in kernels
    ]


def _times(
    measured: dict[tuple[str, int], Any], measure: Callable[[Any], dict[str, float]], steps: int, budget: float = 0.05
) -> dict[tuple[str, int], dict[str, Summary]]:
    """Interleaved times of a step, of which `measure` takes `steps` at once. budget: seconds for each member."""
    return time_interleaved(measured, measure, 0.004 / steps, budget * len(measured) / steps, max_rounds=8)


def _time_rows(
    comparison: Comparison,
    times: dict[tuple[str, int], dict[str, Summary]],
    l2: str,
    device: dict[tuple[str, int], dict[str, list[Kernel]]],
    copy_gb_per_s: float,
) -> list[CudaRow]:
    case = comparison.case
    peers = {p.operation: name for name, p in PROVIDERS.items() if p.layer == "BatchNorm2d" and not p.compiled}
    rows = []
    for (name, components), by_direction in times.items():
        provider = PROVIDERS[name]
        base = times.get((peers[provider.operation], 1), {})
        kernels = device.get((name, components), {})
        if kernels:
            kernels = kernels | {BOTH: kernels[FORWARD] + kernels[BACKWARD]}
        for direction, summary in by_direction.items():
            residual = provider.operation == ADD_RELU
            rate = gigabytes_per_second(direction, case.tensor_bytes, summary.median, residual)
            rows.append(
                CudaRow(
                    provider=name,
                    **replace(case, components=components).labels,
                    direction=direction,
                    median_us=summary.median,
                    p20_us=summary.p20,
                    p80_us=summary.p80,
                    samples=summary.samples,
                    gb_per_s=rate,
                    ratio_to_batchnorm=summary.median / base[direction].median if base else None,
                    phase=comparison.phase,
                    l2=l2,
                    copy_percent=100 * rate / copy_gb_per_s,
                    device_us=sum(k.microseconds for k in kernels[direction]) if kernels else None,
                    kernels=listed(kernels.get(direction, [])),
                )
            )
    return rows
