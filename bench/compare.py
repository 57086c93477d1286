"""One comparison: providers on the same case, checked, timed side by side, and their peak memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.harness import (
    DIRECTIONS,
    MemoryRow,
    TimeRow,
    allocated_peak,
    gigabytes_per_second,
    resident_peak,
    time_interleaved,
)
from bench.providers import (
    BATCHNORM,
    Case,
    LayerWorkload,
    check,
    expected_results,
    make_problem,
    results,
    set_up,
)


@dataclass(frozen=True)
class Comparison:
    """A case, whose number of components each member replaces, and its members: (provider, components).

    phase: the part of a benchmark to which it belongs, which has each case once.
    """

    case: Case
    members: tuple[tuple[str, int], ...]
    phase: str = ""

    def __post_init__(self) -> None:
        if (BATCHNORM, 1) not in self.members:
            raise ValueError(f"expected {BATCHNORM} among the members, which all are compared with; got {self.members}")


def compare(comparison: Comparison) -> tuple[list[TimeRow], list[MemoryRow]]:
    """Set up, check, time and weigh the members of a comparison."""
    # A compiler that met too many shapes would fall back to eager execution.
    torch.compiler.reset()
    problems = {}
    for components in {components for _, components in comparison.members}:
        problems[components] = make_problem(replace(comparison.case, components=components))
    workloads = {member: set_up(member[0], problems[member[1]]) for member in comparison.members}
    for components, problem in problems.items():
        expected = {}
        for (provider, its_components), workload in workloads.items():
            if its_components == components:
                split = workload.provider.split
                if split not in expected:
                    expected[split] = expected_results(problem, groups=problem.groups if split else None)
                check(provider, problem.case, results(workload), expected[split])
        del expected

    times = time_interleaved(workloads)
    time_rows = []
    for (provider, components), by_direction in times.items():
        case = problems[components].case
        for direction in DIRECTIONS:
            summary = by_direction[direction]
            time_rows.append(
                TimeRow(
                    provider=provider,
                    **case.labels,
                    direction=direction,
                    median_us=summary.median,
                    p20_us=summary.p20,
                    p80_us=summary.p80,
                    samples=summary.samples,
                    gb_per_s=gigabytes_per_second(direction, case.tensor_bytes, summary.median),
                    ratio_to_batchnorm=summary.median / times[BATCHNORM, 1][direction].median,
                )
            )
    return time_rows, [_memory(provider, workload) for (provider, _), workload in workloads.items()]


def _memory(provider: str, workload: LayerWorkload) -> MemoryRow:
    case = workload.problem.case

    def step() -> Sequence[torch.Tensor]:
        output = workload.forward()
        return output.detach(), workload.backward(output)[0]

    resident = resident_peak(step)
    return MemoryRow(
        provider=provider,
        **case.labels,
        in_out=4 * case.tensor_bytes,
        beyond=allocated_peak(step),
        resident=None if resident is None else resident - 2 * case.tensor_bytes,
    )
