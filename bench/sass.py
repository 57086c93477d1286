"""What the compiler made of the kernels: instructions, MUFU operations, registers and bytes an element, by pass.

`python -m bench sass` reads the machine code (SASS) of the CUDA library and sets it beside what was planned.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from rich.console import Console

import cbn_ext
from bench.report import Report, Table
from bench.sass_loops import Instruction, count, innermost_loops, parse, usual_paths

#: Picoseconds of an H200 at 1.98 GHz and 4.3 TB/s: an issue slot, a MUFU operation, a byte of DRAM.
ISSUE_PS, MUFU_PS, BYTE_PS = 0.030, 0.24, 0.233

#: Of four components, an element: instructions in trial kernels and MUFU operations, by pass.
PLANNED = {
    "statistics": (29, 4),
    "normalise": (24, 4),
    "backward reduction": (27, 4),
    "input gradient, p detached": (30, 4),
    "input gradient": (53, 4),
}
_COMPONENTS = 4

_KERNEL = re.compile(
    r"_ZN3cbn\d+(reduce|map|resident)_kernelINS_6ConfigI(f|N3c104HalfE|N3c108BFloat16E)Li(\d+)ELb([01])EEE"
    r"LNS_4PassE(\d)EEEv"
)
_DTYPES = {"f": ("float32", 4), "N3c104HalfE": ("float16", 2), "N3c108BFloat16E": ("bfloat16", 2)}
#: By the number of a kernel's pass: what it does while it fetches, while it stores, and the tensors like x it reads.
_PASSES = {
    "0": ("statistics", "", 1),
    "1": ("statistics", "normalise", 1),
    "2": ("backward reduction", "", 2),
    "3": ("backward reduction", "input gradient", 2),
}


@dataclass(frozen=True)
class SassRow:
    """The usual path of a pass with four components; counts are of one element.

    path: "streaming", the kernel reads from memory what it works on, or "on chip", the second pass does not.
    memory, shared: instructions that access global and shared memory. elements: of a thread in one turn of the loop.
    """

    arch: str
    dtype: str
    layout: str
    path: str
    name: str
    instructions: float
    mufu: float
    memory: float
    shared: float
    bytes: int
    elements: int
    registers: int
    stack: int


@dataclass(frozen=True)
class Environment:
    """What was read, and by what it was compiled."""

    device: str
    torch: str
    cbn_ext: str
    date: str


def run(console: Console, library: Path | None, folder: Path) -> None:
    """Read `library`, by default that of cbn_ext, show and write a report for each architecture in it.

    Raises:
        FileNotFoundError: no library or no disassembler.
        RuntimeError: the disassembler failed, or there are no kernels in the library.
    """
    library = library or find_library()
    tool = find_disassembler()
    listing = _call(tool, "--list-elf", str(library))
    archs = sorted(set(re.findall(r"\.(sm_\w+)\.cubin", listing)))
    if not archs:
        raise RuntimeError(f"expected machine code in {library}, found none")
    for arch in archs:
        report = make_report(arch, list(rows_of(tool, library, arch)))
        report.show(console)
        for path in report.write(folder):
            console.print(f"wrote {path}")


def find_library() -> Path:
    """The CUDA library beside the package's modules."""
    folder = Path(cbn_ext.__file__).parent
    for path in folder.glob("_C_cuda*.so"):
        return path
    raise FileNotFoundError(f"expected the CUDA library _C_cuda*.so in {folder}; it is not built")


def find_disassembler() -> str:
    """cuobjdump: of the toolkit, on PATH, or that of Triton's package."""
    candidates = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if triton := importlib.util.find_spec("triton"):
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in candidates:
        if (folder / "cuobjdump").is_file():
            return str(folder / "cuobjdump")
    if found := shutil.which("cuobjdump"):
        return found
    raise FileNotFoundError(f"expected cuobjdump in {', '.join(map(str, candidates))} or on PATH; found none")


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed: {done.stderr.strip()}")
    return done.stdout


def rows_of(tool: str, library: Path, arch: str) -> Iterator[SassRow]:
    """The rows of every kernel with four components, in the order of their passes."""
    usage = registers(_call(tool, "-res-usage", "-arch", arch, str(library)))
    wanted = [name for name in usage if (kernel := _KERNEL.match(name)) and int(kernel[3]) == _COMPONENTS]
    if not wanted:
        raise RuntimeError(f"expected kernels of {_COMPONENTS} components for {arch} in {library}, found none")
    functions = parse(_call(tool, "-sass", "-arch", arch, "-fun", ",".join(wanted), str(library)))
    rows = [row for name in wanted for row in rows_of_kernel(arch, name, functions[name], *usage[name])]
    order = list(PLANNED)
    rows.sort(key=lambda row: (row.layout != "contiguous", row.dtype, row.path != "streaming", order.index(row.name)))
    yield from rows


def registers(text: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack by function, from the output of `cuobjdump -res-usage`."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    return {name: (int(count), int(stack)) for name, count, stack in found}


def exponentials(code: Sequence[Instruction]) -> int:
    """Base-2 exponentials."""
    return count(code, "MUFU", "EX2")


def rows_of_kernel(arch: str, name: str, code: list[Instruction], register_count: int, stack: int) -> Iterator[SassRow]:
    """A row for each loop over elements: of those for bounded log-odds, which have one exponential less."""
    kernel = _KERNEL.match(name)
    dtype, size = _DTYPES[kernel[2]]
    while_fetching, while_storing, tensors = _PASSES[kernel[5]]
    loops: dict[tuple[bool, bool], Sequence[Instruction]] = {}
    for loop in innermost_loops(code, "MUFU", "EX2"):
        kind = count(loop, "LDGSTS") > 0, count(loop, "STG") > 0
        loops[kind] = min(loop, loops.get(kind, loop), key=exponentials)
    if not loops:
        raise RuntimeError(f"{name}, {arch}: expected a loop with exponentials, found none")
    for (fetches, stores), loop in loops.items():
        elements = exponentials(loop) // (_COMPONENTS - 1)
        access = min(16, elements * size)
        accesses = elements * size // access
        wanted = (exponentials(loop), tensors * accesses * fetches, accesses * stores)
        costs = {work.optional: cost for work, cost in usual_paths(loop, 8 * access).items() if work[:3] == wanted}
        if not costs:
            raise RuntimeError(f"{name}, {arch}: expected a path through a loop that does {wanted}, found none")
        label = while_storing if stores else while_fetching
        variants = {label: min(costs)}
        if label == "input gradient":
            # The covariance, once an element, is passed over where responsibilities are constants.
            variants = {"input gradient, p detached": min(costs), label: max(o for o in costs if o <= elements)}
        for what, optional in variants.items():
            cost = costs[optional]
            yield SassRow(
                arch=arch,
                dtype=dtype,
                layout="channels_last" if kernel[4] == "1" else "contiguous",
                path="on chip" if kernel[1] == "resident" else "streaming",
                name=what,
                instructions=cost.instructions / elements,
                mufu=cost.mufu / elements,
                memory=cost.memory / elements,
                shared=cost.shared / elements,
                bytes=size * (tensors * fetches + stores),
                elements=elements,
                registers=register_count,
                stack=stack,
            )


def make_report(arch: str, rows: list[SassRow]) -> Report:
    """The rows of one architecture beside the plan."""
    environment = Environment(arch, torch.__version__, cbn_ext.__version__, date.today().isoformat())
    header = ("layout, dtype", "path", "pass", "instructions", "planned", "MUFU", "planned", "memory", "shared")
    header += ("bytes", "issue ps", "MUFU ps", "DRAM ps", "elements", "registers", "stack")
    sections: dict[tuple[str, str], list[list[str]]] = {}
    for row in rows:
        instructions, mufu = PLANNED[row.name]
        sections.setdefault((row.layout, row.dtype), []).append(
            [
                f"{row.layout} {row.dtype}",
                row.path,
                row.name,
                f"{row.instructions:.1f}",
                str(instructions),
                f"{row.mufu:.2f}",
                str(mufu),
                f"{row.memory:.2f}",
                f"{row.shared:.2f}",
                str(row.bytes),
                f"{row.instructions * ISSUE_PS:.2f}",
                f"{row.mufu * MUFU_PS:.2f}",
                f"{row.bytes * BYTE_PS:.2f}",
                str(row.elements),
                str(row.registers),
                str(row.stack),
            ]
        )
    return Report(
        kind="sass",
        environment=environment,
        facts=f"Machine code for {arch}, compiled beside torch {environment.torch}, cbn_ext {environment.cbn_ext}; "
        f"{environment.date}.",
        csv={"": rows},
        tables=[Table(f"An element of four components, {arch}", header, list(sections.values()))],
        figures={},
        text=_HOW,
    )


_HOW = f"""## How this was counted

- A row is one loop over elements on its usual path: aligned input, bounded log-odds, no ReLU, no residual, no groups.
  Of the paths through a loop it is the shortest one with all exponentials and with accesses of full width to every
  tensor that the pass reads and writes; counts are divided by the elements that a thread takes in one turn, and the
  loop's own instructions are among them. What a block does before and after the loop is not.
- *planned*: instructions of trial kernels that held the formulas alone, and the special-function operations they need.
- *memory*, *shared*: instructions that access global and shared memory. *bytes*: moved to and from global memory.
- ps: at an H200's 1.98 GHz and 4.3 TB/s, where an instruction takes {ISSUE_PS:.3f} ps, a special-function operation
  {MUFU_PS:.2f} ps and a byte {BYTE_PS:.3f} ps. The largest of the three bounds a pass from below.
- *on chip*: both passes in one kernel, whose registers both rows name; the second reads what the first one kept."""
