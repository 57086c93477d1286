"""Which path should serve which input, and by which constants? The operators' own choice beside all others."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from bench.cuda_compare import CudaRow, Measured
from bench.cuda_tables import Case, by_case, number, short_kernels
from bench.cuda_targets import Times
from bench.graphs import Environment
from bench.harness import BACKWARD, FORWARD
from bench.providers import BATCHNORM, OURS, PROVIDERS
from bench.report import Report, Table

_SETTINGS = [name for name, provider in PROVIDERS.items() if provider.settings]


@dataclass(frozen=True)
class SweepRow(CudaRow):
    """A time and the settings that it was taken with, None where the operators chose."""

    blocks: int | None
    ahead: int | None
    threads: int | None
    cluster: int | None


def csv_of(found: Measured) -> dict[str, Sequence[SweepRow]]:
    """The rows of the CSV file, by what its name ends with."""
    names = ("blocks", "ahead", "threads", "cluster")
    rows = [
        SweepRow(**vars(row), **{name: PROVIDERS[row.provider].settings.get(name.upper()) for name in names})
        for row in found.times
    ]
    return {"-sweep": rows}


def make_report(environment: Environment, found: Measured) -> Report:
    """The fastest setting of every case, and what each setting is worth over all of them."""
    times = Times(found.times)
    return Report(
        kind="cuda",
        environment=environment,
        facts=f"{environment.facts} Measured in {found.seconds:.0f} s.",
        csv=csv_of(found),
        tables=[_setting_table(times), *(_fastest_table(times, direction) for direction in (FORWARD, BACKWARD))],
        figures={},
        text=_HOW,
        warnings=found.warnings,
        part="-sweep",
    )


def _fastest_table(times: Times, direction: str) -> Table:
    """The operators' own choice beside the fastest setting of either path."""

    def fastest(case: Case, resident: bool) -> tuple[float, str] | None:
        rows = [row for name in _SETTINGS if (row := times.rows.get((name, 4, *case, direction)))]
        return min(((r.median_us, r.provider) for r in rows if ("resident" in r.kernels) == resident), default=None)

    def cells(case: Case) -> list[str]:
        own = times.rows.get((OURS, 4, *case, direction))
        found = [fastest(case, resident) for resident in (False, True)]
        best = min((each for each in found if each), default=None)
        return [
            number(times.value(BATCHNORM, 1, case, direction), 1),
            number(own and own.median_us, 1),
            short_kernels(own) if own else "",
            *(cell for each in found for cell in ((number(each[0], 1), each[1]) if each else ("", ""))),
            number(own.median_us / best[0]) if own and best else "",
        ]

    header = ("input", "BatchNorm2d, µs", "own choice, µs", "its kernels", "streaming, µs", "fastest setting")
    header += ("on chip, µs", "fastest setting", "own choice / fastest")
    return by_case(f"Which path for which input: {direction}", header, times, cells)


def _setting_table(times: Times) -> Table:
    """Each setting's time in units of the own choice's, by layout and direction."""
    groups = [
        (layout, d) for layout in dict.fromkeys(layout for _, layout in times.groups()) for d in (FORWARD, BACKWARD)
    ]

    def mean(name: str, layout: str, direction: str) -> float | None:
        ratios = [times.ratio(name, OURS, case, direction) for case in times.cases() if case[2] == layout]
        ratios = [ratio for ratio in ratios if ratio is not None]
        return geometric_mean(ratios) if ratios else None

    body = [[name, *(number(mean(name, *group)) for group in groups)] for name in _SETTINGS]
    title = "Settings, relative to the operators' own choice: geometric means over the cases"
    return Table(title, ("setting", *(", ".join(group) for group in groups)), [body])


_HOW = """## How this was measured

- As the rest of the CUDA benchmark, M = 4, L2 cold; all settings of a case side by side in one process. A setting is a
  set of environment variables, CBN_CUDA_CLUSTER and so on, under which the steps were captured.
- *cluster=0* is the streaming path, which reads every value twice. Else a channel is kept on chip where the shared
  memory of so many blocks suffices, and streamed where it does not: the kernels tell which path it was."""
