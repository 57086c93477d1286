"""Runs the case table on emulated devices, in processes of their own."""

import ctypes
import pickle
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from python_tests.emulation.build import run_python
from python_tests.support.cases import Case, Results, assert_results, expected, run


class Launch(NamedTuple):
    """A kernel, by its symbol, in clusters of so many blocks; with how many blocks at most."""

    kernel: str
    cluster: int
    blocks: int


class Table(NamedTuple):
    """What came of running cases on a device."""

    results: list[Results | str]  # of each case; or the error's message
    launches: list[Launch]
    process_error: str  # what ended the process before its end, or ""


def run_table(library: Path, cases: Sequence[Case], device: Mapping[str, str], seed: int = 0) -> Table:
    """Run cases with the kernels of a library.

    Args:
        library: with the operators, from `build`.
        cases: to run.
        device: environment variables that tell what device is emulated, and what of it the planner uses.
        seed: of the order of threads and blocks.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder, "task"), Path(folder, "answer")
        task.write_bytes(pickle.dumps(list(cases)))
        process = run_python(
            "from python_tests.emulation.table import _run; _run()",
            *map(str, (library, task, answer)),
            CBN_EMULATION_SEED=str(seed),
            **device,
        )
        if process.returncode != 0:
            last = (process.stdout.splitlines() or ["nothing"])[-1]
            return Table([], [], f"in {last}, exit status {process.returncode}:\n{process.stderr}")
        return Table(*pickle.loads(answer.read_bytes()), "")


def failures(cases: Sequence[Case], table: Table) -> list[str]:
    """What is wrong with the table of these cases, by the oracle; nothing if it is empty."""
    if table.process_error:
        return [table.process_error]
    found = []
    for case, result in zip(cases, table.results, strict=True):
        try:
            assert not isinstance(result, str), result
            assert_results(result, expected(case), case)
        except AssertionError as error:
            found.append(f"{case}: {error}")
    return found


def _run() -> None:
    library, task, answer = sys.argv[1:]
    torch.ops.load_library(library)
    torch.use_deterministic_algorithms(True)  # also: what is allocated is filled with NaN

    def result(case: Case) -> Results | str:
        print(case, flush=True)
        try:
            return run(case, "native")
        except RuntimeError as error:
            return str(error)

    results = [result(case) for case in pickle.loads(Path(task).read_bytes())]
    emulation = ctypes.CDLL(library)
    emulation.cbn_emulation_launches.restype = ctypes.c_char_p
    lines = emulation.cbn_emulation_launches().decode().splitlines()
    launches = [Launch(name, int(cluster), int(blocks)) for name, cluster, blocks in map(str.split, lines)]
    Path(answer).write_bytes(pickle.dumps((results, launches)))
