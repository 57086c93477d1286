"""Comparisons on a GPU within a time budget: members set up, checked, weighed, captured, timed side by side, traced."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from types import MappingProxyType
from typing import Any

import torch

import cbn_ext
from bench.cases import Case, Problem, make_problem
from bench.cuda.plan import EAGER
from bench.cuda.timer import Kernel, Timer, listed
from bench.harness import BACKWARD, BOTH, FORWARD, MemoryRow, Row, TimeRow, gigabytes_per_second, time_interleaved
from bench.providers import ADD_RELU, OURS, PROVIDERS, Checker, Comparison, LayerWorkload, cuda_settings, set_up
from cbn_ext import Mode

#: Seconds that a comparison is expected to take before one of its phase is measured: without and with compilation.
_FIRST_GUESS = (2.0, 15.0)
#: Bytes of x and y over all steps of a graph, so that its replay takes a fifth of a millisecond or more ...
_GRAPH_BYTES = 8 * 10**8
#: ... but steps that only wait for launches need not be more than these.
_MOST_STEPS = 128
_HOT_STEPS = 50
#: Steps of an eager measurement, which are queued without waiting for the device.
_EAGER_STEPS = 100
#: Elements of those channels whose results are compared with the reference.
_CHECKED_ELEMENTS = 2**23

Member = tuple[str, int]


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
class KernelRow(Row):
    """One kernel of one provider, L2 cold: calls, and microseconds on the device, both of one step."""

    direction: str
    kernel: str
    calls: float
    device_us: float


@dataclass
class Measured:
    """What has been found out so far; memory and kernels of what several phases measure are those of the first.

    failures: what could not be measured, and why. broken: some of that is for this package to mend. left_out: by phase,
    the cases that the time did not suffice for.
    """

    times: list[CudaRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    broken: bool = False
    left_out: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def fail(self, what: str, case: Case, error: Exception, ours: bool = False) -> None:
        """Note the first line of what an error has to say; `ours`: it is for this package to mend."""
        first_line = next(iter(str(error).splitlines()), "")
        self.failures.append(f"{what}, {case}: {type(error).__name__}: {first_line}")
        self.broken |= ours

    @property
    def warnings(self) -> list[str]:
        """What is missing, and why."""
        return [f"FAILED: {failure}" for failure in self.failures] + [
            f"Left out of {phase}, the time was over ({len(cases)}): {'; '.join(cases)}"
            for phase, cases in self.left_out.items()
        ]


class DeviceLostError(RuntimeError):
    """The device answers nothing more within this process."""


def run(
    timer: Timer,
    copy_gb_per_s: float,
    plan: Sequence[Comparison],
    seconds: float,
    save: Callable[[Measured], None],
    clock: Callable[[], float] = time.monotonic,
) -> Measured:
    """Measure one comparison after the other for about `seconds`, and hand what was found to `save` after each.

    A comparison is left out where less time remains than the longest of its phase took.
    """
    start = clock()
    found = Measured()
    longest: dict[str, float] = {}  # seconds, by phase
    for number, comparison in enumerate(plan):
        case, phase = comparison.case, comparison.phase
        begin = clock()
        guess = _FIRST_GUESS[any(PROVIDERS[name].compiled for name, _ in comparison.members)]
        if seconds - (begin - start) < longest.get(phase, guess):
            found.left_out.setdefault(phase, []).append(str(case))
            continue
        # At once, should the process end before its time.
        print(f"{begin - start:4.0f} s, {number + 1} of {len(plan)}, {phase}: {case}", flush=True)
        try:
            with cbn_ext.use_backend("native"):
                (measure_eager if phase == EAGER else measure)(comparison, timer, copy_gb_per_s, found)
        except (DeviceLostError, KeyboardInterrupt) as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else "the device failed"
            for rest in plan[number:]:
                found.left_out.setdefault(rest.phase, []).append(f"{rest.case} ({why})")
            break
        except Exception as error:  # such as memory that does not suffice for the inputs: the others are measured
            found.fail("the inputs", case, error)
        finally:
            found.seconds = clock() - start
            save(found)
        longest[phase] = max(longest.get(phase, 0.0), clock() - begin)
    return found


def measure(comparison: Comparison, timer: Timer, copy_gb_per_s: float, found: Measured) -> None:
    """Add what is found about the members of a comparison to `found`; a member that fails is left out of the rest.

    Raises:
        DeviceLostError: an error after which nothing more can be measured.
    """
    # A compiler that met too many shapes would fall back to eager execution.
    torch.compiler.reset()
    timer.release()
    case = comparison.case

    @contextmanager
    def failures_of(what: str, ours: bool = False) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            found.fail(what, case, error, ours)
            try:
                timer.synchronize()
            except Exception as sticky:
                raise DeviceLostError(found.failures[-1]) from sticky

    problems = _problems(comparison)
    steps = rotated_steps(case, timer.cache_bytes)
    copies = [_copied(problems[1]) for _ in range(steps)]
    check = Checker(_CHECKED_ELEMENTS)
    cold, hot, device = {}, {}, {}
    for name, components in comparison.members:
        provider, problem = PROVIDERS[name], problems[components]
        # One more compilation, for which the time is too dear; settings are compared in training alone, and in
        # evaluation there are no groups.
        evaluation = not (provider.compiled or provider.settings or provider.mode is Mode.GROUPS)
        with failures_of(name, ours=provider.layer == OURS), cuda_settings(provider.settings):
            workload = set_up(name, problem)
            check(workload, evaluation)
            memory = MemoryRow(
                name, **problem.case.labels, in_out=workload.in_out_bytes,
                beyond=timer.peak_memory(workload.tensors), resident=None,
            )  # fmt: skip
            workloads = [replace(workload, problem=replace(problem, **tensors)) for tensors in copies]
            captured = timer.capture(workloads, True, evaluation)
            if 5 * case.tensor_bytes <= timer.cache_bytes:
                hot[name, components] = timer.capture(workloads[:1] * _HOT_STEPS, False, evaluation)
            cold[name, components] = captured
            _add_new(found.memory, [memory])
    with failures_of("the profiler"):
        device = dict(zip(cold, timer.kernels(list(cold.values())), strict=True))
    with failures_of("the timing"):
        found.times += _time_rows(comparison, cold, timer.measure, steps, "cold", copy_gb_per_s, device)
        found.times += _time_rows(comparison, hot, timer.measure, _HOT_STEPS, "hot", copy_gb_per_s)
    labels = {member: {"provider": member[0], **problems[member[1]].case.labels} for member in device}
    kernels = [
        KernelRow(**labels[member], direction=direction, kernel=k.name, calls=k.calls, device_us=k.microseconds)
        for member, by_direction in device.items()
        for direction, kernels in by_direction.items()
        for k in kernels
    ]
    _add_new(found.kernels, kernels)


def measure_eager(comparison: Comparison, timer: Timer, copy_gb_per_s: float, found: Measured) -> None:
    """Add the wall-clock times of eager steps, forward+backward, many of them queued before the device is waited for.

    For inputs so small that the device waits for the host.
    """

    def wall_clock(workload: LayerWorkload) -> dict[str, float]:
        start = time.perf_counter_ns()
        for _ in range(_EAGER_STEPS):
            workload.backward(workload.forward())
        timer.synchronize()
        return {BOTH: (time.perf_counter_ns() - start) / 1e3 / _EAGER_STEPS}

    problems = _problems(comparison)
    workloads = {member: set_up(member[0], problems[member[1]]) for member in comparison.members}
    found.times += _time_rows(comparison, workloads, wall_clock, _EAGER_STEPS, EAGER, copy_gb_per_s, seconds=1.0)


def rotated_steps(case: Case, cache_bytes: int) -> int:
    """Steps of a graph, each with tensors of its own: together at least three times the L2 cache."""
    of_step = 2 * case.tensor_bytes
    return max(ceil(3 * cache_bytes / of_step), min(_MOST_STEPS, ceil(_GRAPH_BYTES / of_step)))


def _problems(comparison: Comparison) -> dict[int, Problem]:
    """By the number of components."""
    counts = dict.fromkeys(components for _, components in comparison.members)
    return {components: make_problem(replace(comparison.case, components=components)) for components in counts}


def _copied(problem: Problem) -> dict[str, torch.Tensor]:
    """What is like x, whatever the number of components."""
    names = ("x", "grad_output", "residual")
    tensors = {name: getattr(problem, name) for name in names}
    return {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}


def _add_new(rows: list[Row], more: Sequence[Row]) -> None:
    """Add the rows of those members and cases of which there are none."""
    known = {(row.member, row.label) for row in rows}
    rows += [row for row in more if (row.member, row.label) not in known]


def _time_rows(
    comparison: Comparison,
    measured: dict[Member, Any],
    measure: Callable[[Any], dict[str, float]],
    steps: int,
    l2: str,
    copy_gb_per_s: float,
    device: Mapping[Member, dict[str, list[Kernel]]] = MappingProxyType({}),
    seconds: float = 0.05,
) -> list[CudaRow]:
    """Times of one step, of which `measure` takes `steps` at once. seconds: for each member."""
    if not measured:
        return []
    budget = seconds * len(measured) / steps
    times = time_interleaved(measured, measure, 0.004 / steps, budget, max_rounds=8)
    rows = []
    for (name, components), by_direction in times.items():
        provider, case = PROVIDERS[name], replace(comparison.case, components=components)
        peer = times.get((provider.peer, 1))
        kernels = device.get((name, components), {})
        if kernels:
            kernels = kernels | {BOTH: kernels[FORWARD] + kernels[BACKWARD]}
        for direction, summary in by_direction.items():
            residual = provider.operation == ADD_RELU
            rate = gigabytes_per_second(direction, case.tensor_bytes, summary.median_us, residual)
            rows.append(
                CudaRow(
                    name,
                    **case.labels,
                    direction=direction,
                    **vars(summary),
                    gb_per_s=rate,
                    ratio_to_batchnorm=summary.median_us / peer[direction].median_us if peer else None,
                    phase=comparison.phase,
                    l2=l2,
                    copy_percent=100 * rate / copy_gb_per_s,
                    device_us=sum(k.microseconds for k in kernels[direction]) if kernels else None,
                    kernels=listed(kernels.get(direction, [])),
                )
            )
    return rows
