"""Which path should serve which input, and by which constants? The operators' own choice beside all others."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.cuda.measure import CudaRow, Measured
from bench.cuda.plan import LAYOUTS
from bench.cuda.tables import Case, Times, by_case, short_kernels
from bench.harness import BACKWARD, FORWARD
from bench.providers import BATCHNORM, OURS, PROVIDERS
from bench.report import Table, number

_SETTINGS = [name for name, provider in PROVIDERS.items() if provider.settings]


@dataclass(frozen=True)
class SweepRow(CudaRow):
    """A time and the settings that it was taken with, None where the operators chose."""

    blocks: int | None
    threads: int | None
    cluster: int | None


def csv_of(found: Measured) -> dict[str, Sequence[SweepRow]]:
    """The rows of the CSV file, by what its name ends with."""
    names = ("blocks", "threads", "cluster")
    rows = [
        SweepRow(**vars(row), **{name: PROVIDERS[row.provider].settings.get(name.upper()) for name in names})
        for row in found.times
    ]
    return {"-sweep": rows}


def tables(found: Measured) -> list[Table]:
    """What each setting is worth over all cases, and the fastest setting of every case."""
    times = Times(found.times)
    return [_setting_table(times), *(_fastest_table(times, direction) for direction in (FORWARD, BACKWARD))]


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
    by_layout = {layout: [case for case in times.cases if case[2] == layout] for layout in LAYOUTS}
    groups = [(layout, d) for layout, cases in by_layout.items() if cases for d in (FORWARD, BACKWARD)]
    body = [[name, *(number(times.mean(name, OURS, by_layout[at], d)) for at, d in groups)] for name in _SETTINGS]
    title = "Settings, relative to the operators' own choice: geometric means over the cases"
    return Table(title, ("setting", *(", ".join(group) for group in groups)), [body])


HOW = """## How this was measured

- As the rest of the CUDA benchmark, M = 4, L2 cold; all settings of a case side by side in one process. A setting is a
  set of environment variables, CBN_CUDA_CLUSTER and so on, under which the steps were captured.
- *cluster=0* is the streaming path, which reads every value twice. Else a channel is kept on chip where the shared
  memory of so many blocks suffices, and streamed where it does not: the kernels tell which path it was."""
