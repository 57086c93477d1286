"""Instructions, MUFU operations, registers and bytes an element of the kernels' loops, by pass and form.

`python -m bench sass` reads the machine code (SASS) of the CUDA library and sets it beside what the formulas need and
the limits that the project set itself.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import cbn_ext
from bench.report import Report, Table, Target, target_table, versions
from bench.sass.code import Instruction, count, parse
from bench.sass.loops import COMPONENTS, FORMS, NAMES, PLAIN, RELU, SUM, Kernel, counted, loops_of, prologue
from bench.sass.tools import cuobjdump

#: Picoseconds of an H200 at 1.98 GHz and 4.3 TB/s: an issue slot, a MUFU operation, a byte of DRAM.
ISSUE_PS, MUFU_PS, BYTE_PS = 0.030, 0.24, 0.233

#: Instructions an element that the formulas alone need with bounded log-odds: of each component, and beside these.
FORMULAS = {
    "statistics": (7, 0),
    "normalise": (6, -2),
    "backward reduction": (6, 0),
    "input gradient, p detached": (7, -2),
    "input gradient": (14, -6),
}


class Limits(NamedTuple):
    """What the project set itself for the plain form of a pass, contiguous.

    float32, narrow: instructions an element with four components, narrow for the 16-bit types. eight: float32 with
    eight components. registers: with four.
    """

    float32: float
    narrow: float
    eight: float
    registers: int


LIMITS = {
    "statistics": Limits(32, 33, 61, 64),
    "normalise": Limits(27, 27, 52, 64),
    "backward reduction": Limits(29, 30.5, 54, 64),
    "input gradient, p detached": Limits(32, 33, 61, 64),
    "input gradient": Limits(57, 58, 114, 80),
}
#: Instructions beyond these limits that channels_last may take, and beyond the plain form the others of bounded
#: log-odds.
MORE_IN_CHANNELS_LAST, MORE_THAN_PLAIN = 2, 7


@dataclass(frozen=True)
class SassRow:
    """One form of a pass; counts are of one element.

    components: as compiled. path: "streaming", the kernel reads from memory what it works on, or "on chip", it keeps
    that there. memory, shared: instructions that access global and shared memory. elements: of a thread in one turn of
    the loop. prologue: the kernel's instructions before its first loop over elements.
    """

    arch: str
    components: int
    dtype: str
    layout: str
    path: str
    name: str
    form: str
    instructions: float
    mufu: float
    memory: float
    shared: float
    bytes: int
    elements: int
    prologue: int
    registers: int
    stack: int


def run(library: Path | None, folder: Path) -> None:
    """Read `library`, by default that of cbn_ext, show and write a report for each architecture in it.

    Raises:
        FileNotFoundError: no library or no disassembler.
        RuntimeError: the disassembler failed, or there are no kernels in the library.
    """
    library = library or find_library()
    archs = sorted(set(re.findall(r"\.(sm_\w+)\.cubin", "".join(cuobjdump(library, "--list-elf")))))
    if not archs:
        raise RuntimeError(f"expected machine code in {library}, found none")
    for arch in archs:
        report = make_report(arch, rows_of(library, arch))
        report.show()
        report.write(folder)


def find_library() -> Path:
    """The CUDA library beside the package's modules."""
    folder = Path(cbn_ext.__file__).parent
    for path in folder.glob("_C_cuda*.so"):
        return path
    raise FileNotFoundError(f"expected the CUDA library _C_cuda*.so in {folder}; it is not built")


def rows_of(library: Path, arch: str) -> list[SassRow]:
    """The rows of every kernel that is counted, in the order of the passes."""
    usage = registers(cuobjdump(library, "-res-usage", "-arch", arch))
    kernels = [kernel for name in usage if (kernel := counted(arch, name))]
    if not kernels:
        raise RuntimeError(f"expected kernels of {COMPONENTS} components for {arch} in {library}, found none")
    names = ",".join(kernel.mangled for kernel in kernels)
    functions = parse(cuobjdump(library, "-sass", "-arch", arch, "-fun", names))
    rows = [row for k in kernels for row in rows_of_kernel(k, functions[k.mangled], *usage[k.mangled])]
    rows.sort(key=lambda row: (row.path != "streaming", NAMES.index(row.name), FORMS.index(row.form)))
    rows.sort(key=lambda row: (row.components, row.layout != "contiguous", row.dtype))
    return rows


def registers(lines: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack by function, from the output of `cuobjdump -res-usage`."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", "".join(lines))
    return {name: (int(count), int(stack)) for name, count, stack in found}


def rows_of_kernel(kernel: Kernel, code: Sequence[Instruction], register_count: int, stack: int) -> Iterator[SassRow]:
    """A row for each loop: a turn executes all its instructions."""
    before = prologue(code)
    for loop in loops_of(kernel, code):
        yield SassRow(
            arch=kernel.arch,
            components=kernel.components,
            dtype=kernel.dtype,
            layout="channels_last" if kernel.channels_last else "contiguous",
            path="streaming" if loop.streams else "on chip",
            name=loop.name,
            form=loop.form,
            instructions=loop.instructions,
            mufu=count(loop.code, "MUFU") / loop.elements,
            memory=count(loop.code, "LDG", "LDGSTS", "STG") / loop.elements,
            shared=count(loop.code, "LDS", "STS") / loop.elements,
            bytes=loop.moved,
            elements=loop.elements,
            prologue=before,
            registers=register_count,
            stack=stack,
        )


def make_report(arch: str, rows: Sequence[SassRow]) -> Report:
    """The rows of one architecture beside the limits."""
    environment = {"device": arch, **versions(torch, cbn_ext)}
    return Report(
        kind="sass",
        environment=environment,
        facts="Machine code for {device}, compiled beside torch {torch}, cbn_ext {cbn_ext}; {date}.".format(
            **environment
        ),
        csv={"": rows},
        tables=[
            target_table("Limits (streaming; the worst of several types)", targets(rows)),
            *(table(rows, components) for components in COMPONENTS),
        ],
        text=_HOW,
    )


def targets(rows: Sequence[SassRow]) -> list[Target]:
    """The limits and what keeps them or not."""

    def of(name: str, layout: str, form: str = PLAIN, components: int = 4) -> dict[str, SassRow]:
        wanted = "streaming", name, layout, form, components
        return {row.dtype: row for row in rows if (row.path, row.name, row.layout, row.form, row.components) == wanted}

    def target(what: str, values: Iterable[float], limit: float) -> Target:
        return Target(what, max(values, default=None), "≤", limit)

    found = []
    for name, limits in LIMITS.items():
        what = f"instructions, {name}"
        for layout, more in (("contiguous", 0), ("channels_last", MORE_IN_CHANNELS_LAST)):
            plain = of(name, layout)
            wide = [row.instructions for dtype, row in plain.items() if dtype == "float32"]
            narrow = [row.instructions for dtype, row in plain.items() if dtype != "float32"]
            found.append(target(f"{what}, {layout} float32, M = 4", wide, limits.float32 + more))
            found.append(target(f"{what}, {layout} 16-bit, M = 4", narrow, limits.narrow + more))
            for form in (RELU, SUM):
                if fused := of(name, layout, form):
                    beyond = [row.instructions - plain[dtype].instructions for dtype, row in fused.items()]
                    found.append(target(f"{what}, {form} beyond plain, {layout}, M = 4", beyond, MORE_THAN_PLAIN))
        of_eight = of(name, "contiguous", components=8)
        wide = [row.instructions for dtype, row in of_eight.items() if dtype == "float32"]
        found.append(target(f"{what}, contiguous float32, M = 8", wide, limits.eight))
        used = [row.registers for row in of(name, "contiguous").values()]
        found.append(target(f"registers, {name}, contiguous, M = 4", used, limits.registers))
    return found


def table(rows: Sequence[SassRow], components: int) -> Table:
    """The rows of so many components, beside what the formulas need."""
    header = ["layout, dtype", "path", "pass", "form", "instructions", "formulas", "MUFU", "formulas", "memory"]
    header += ["shared", "bytes", "issue ps", "MUFU ps", "DRAM ps", "elements", "prologue", "registers", "stack"]
    sections: dict[str, list[list[str]]] = defaultdict(list)
    for row in rows:
        if row.components != components:
            continue
        label = f"{row.layout} {row.dtype}"
        needed = "", ""
        if row.form == PLAIN and row.name in FORMULAS:
            each, beside = FORMULAS[row.name]
            needed = str(each * components + beside), str(components)
        bounds = row.instructions * ISSUE_PS, row.mufu * MUFU_PS, row.bytes * BYTE_PS
        sections[label].append(
            [
                *(label, row.path, row.name, row.form),
                *(f"{row.instructions:.1f}", needed[0], f"{row.mufu:.2f}", needed[1]),
                *(f"{row.memory:.2f}", f"{row.shared:.2f}", str(row.bytes), *(f"{bound:.2f}" for bound in bounds)),
                *map(str, (row.elements, row.prologue, row.registers, row.stack)),
            ]
        )
    return Table(f"An element of {components} components", header, list(sections.values()))


_FORMULAS_TEXT = "; ".join(
    f"{name} {each} M" + (f" - {-beside}" if beside else "") for name, (each, beside) in FORMULAS.items()
)
_HOW = f"""## How this was counted

- A row is one loop over elements, for whole chunks without groups. A turn executes all its instructions, divided here
  by the elements that a thread takes in it; the loop's own instructions are among them. The last chunks go through a
  second loop, with guards, which is not counted.
- *prologue*: what stands before a kernel's first loop over elements. Loops in it are executed several times, and of a
  condition's arms only one.
- *plain*, *ReLU*, *sum and ReLU*: bounded log-odds, and beside the pass nothing, a ReLU, or the sum with a residual and
  a ReLU with a mask. Of two forms with the same accesses the plain one is shorter. *unbounded*: other log-odds, plain.
- *formulas*: instructions that csrc/mixture.h alone needs where the log-odds are bounded, counted there, a product and
  its addition to something as one: {_FORMULAS_TEXT}.
  M of these are special-function operations (MUFU), M - 1 exponentials and a reciprocal. Loads, stores and conversions
  come on top.
- *joint*: the passes of one mixture over the channels of a point, which needs no exponentials an element. *weights* and
  *gradient of the weights* are sums over the channels of each point, of which a loop over the same points then finds x
  in the cache: *moments* (contiguous elements change their places among the lanes first: *exchange*) and *input
  gradient*. *statistics* is the pass in place of *moments* where a point has too many channels. Weights are not among
  the bytes: M numbers a point, whatever the number of channels.
- *memory*, *shared*: instructions that access global and shared memory. *bytes*: moved to and from global memory, but
  for the mask's bit.
- ps: at an H200's 1.98 GHz and 4.3 TB/s, where an instruction takes {ISSUE_PS:.3f} ps, a special-function operation
  {MUFU_PS:.2f} ps and a byte {BYTE_PS:.3f} ps. The largest of the three bounds a pass from below.
- *on chip*: both passes in one kernel, whose registers both rows name; the second reads what the first one kept in
  shared memory, in joint mode in the cache. Guards are among its instructions, and in the first pass the copies to
  shared memory, which the last turns skip.
- The limits are for streaming kernels. Registers are those of a kernel with all its forms."""
