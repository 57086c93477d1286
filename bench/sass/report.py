"""Instructions, MUFU operations, registers and bytes an element of the kernels' plain loops, by pass.

`python -m bench sass` reads the machine code (SASS) of the CUDA library and sets it beside what was planned.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import cbn_ext
from bench.report import Report, Table, versions
from bench.sass.code import Instruction, accessed, count, has_alternatives, innermost_loops, parse
from bench.sass.tools import cuobjdump

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

_ARITHMETIC = ("FADD", "FMUL", "FFMA")

Loop = tuple[Sequence[Instruction], int]

_KERNEL = re.compile(
    r"_ZN3cbn\d+(\w+)_kernelINS_6ConfigI(f|N3c104HalfE|N3c108BFloat16E)Li(\d+)ELb([01])E"
    r"NS_\d+(Channel|Joint)PosteriorEEE(?:LNS_4PassE(\d)E)?EEv"
)
_DTYPES = {"f": ("float32", 4), "N3c104HalfE": ("float16", 2), "N3c108BFloat16E": ("bfloat16", 2)}
#: By the number of a kernel's pass: the tensors like x it reads, and the rows of its loops that do not store, and that
#: do, the shortest first.
_PASSES = {
    "0": (1, ["statistics"], []),
    "1": (1, ["statistics"], ["normalise"]),
    "2": (2, ["backward reduction"], []),
    "3": (2, ["backward reduction"], ["input gradient, p detached", "input gradient"]),
}
#: The rows of joint mode's kernels, by name and pass: the tensors like x that a loop reads an element of, whether it
#: stores one, whether it reads from memory, and the rows of such loops, the shortest first.
_JOINT_PASSES = {
    ("weigh", None): [(1, False, True, ["joint weights"])],
    ("reduce", "0"): [(1, False, True, ["joint statistics"])],
    ("map_points", "1"): [(1, True, True, ["joint normalise"])],
    ("reduce", "2"): [(2, False, True, ["joint backward reduction"])],
    ("map_points", "3"): [
        (2, False, True, ["joint gradient of the weights"]),
        (2, True, False, ["joint input gradient, p detached", "joint input gradient"]),
    ],
}
#: Where the moments of the points are summed after their weights.
_JOINT_MOMENTS = "joint moments", "joint moments, exchange"
#: Of a kernel's loops: whether they fetch from memory, and whether they store.
_LOOPS = {"reduce": [(True, False)], "map": [(True, True)], "resident": [(True, False), (False, True)]}


@dataclass(frozen=True)
class SassRow:
    """The plain loop of a pass with four components; counts are of one element.

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
    """The rows of every kernel with four components, in the order of their passes."""
    usage = registers(cuobjdump(library, "-res-usage", "-arch", arch))
    wanted = [name for name in usage if (kernel := _KERNEL.match(name)) and is_counted(*kernel.groups())]
    if not wanted:
        raise RuntimeError(f"expected kernels of {_COMPONENTS} components for {arch} in {library}, found none")
    functions = parse(cuobjdump(library, "-sass", "-arch", arch, "-fun", ",".join(wanted)))
    rows = [row for name in wanted for row in rows_of_kernel(arch, name, functions[name], *usage[name])]
    joint = [name for loops in _JOINT_PASSES.values() for *_, names in loops for name in names]
    order = [*PLANNED, *joint, *_JOINT_MOMENTS]
    rows.sort(key=lambda row: (row.layout != "contiguous", row.dtype, row.path != "streaming", order.index(row.name)))
    return rows


def is_counted(kind: str, _: str, components: str, last: str, posterior: str, number: str | None) -> bool:
    """True for the kernels with rows: not for those that work on channels rather than on elements."""
    known = (kind, number) in _JOINT_PASSES if posterior == "Joint" else kind in _LOOPS
    return known and int(components) == _COMPONENTS


def registers(lines: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack by function, from the output of `cuobjdump -res-usage`."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", "".join(lines))
    return {name: (int(count), int(stack)) for name, count, stack in found}


def plain_loops(code: Sequence[Instruction], loaded: int, stored: int) -> list[Sequence[Instruction]]:
    """Loops for bounded log-odds and whole chunks with nothing fused, the shortest first.

    The others have more code for memory: a turn of theirs chooses between accesses of several widths.

    loaded, stored: bytes of global memory an element.
    """

    def is_plain(loop: Sequence[Instruction]) -> bool:
        elements = elements_of(loop)
        moved = accessed(loop, "LDG", "LDGSTS"), accessed(loop, "STG")
        return moved == (elements * loaded, elements * stored) and not has_alternatives(loop)

    return sorted(filter(is_plain, innermost_loops(code, "MUFU", "EX2")), key=len)


def chunk_loops(code: Sequence[Instruction], size: int, tensors: int) -> list[Loop]:
    """The plain loops over chunks of elements without exponentials, with the elements of a turn.

    size: bytes of an element. tensors: how many are loaded.
    """
    found = [(loop, accessed(loop, "LDGSTS") // (size * tensors)) for loop in innermost_loops(code, "LDGSTS", "E")]
    return [(loop, elements) for loop, elements in found if elements and _has_terms(loop, elements)]


def channel_loops(code: Sequence[Instruction], points: int, tensors: int, stores: bool) -> list[Loop]:
    """The plain loops over the channels of some points, with the elements of a turn, the shortest first.

    They load one element at a time, and beside a channel's coefficients its origin.

    points: of a thread. tensors: how many are loaded. stores: whether an element is stored for each.
    """
    found = []
    for loop in innermost_loops(code, "LDG", "128"):
        narrow = count(loop, "LDG") - count(loop, "LDG", modifier="128")
        if narrow == points * tensors + 1 and count(loop, "STG") == points * stores and _has_terms(loop, points):
            found.append((loop, points))
    return sorted(found, key=lambda pair: len(pair[0]))


def moment_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The loop over points that sums moments; contiguous also the one that exchanges elements among the lanes."""
    found = []
    for loop in innermost_loops(code, "LDS", "128"):
        points = count(loop, "LDS", modifier="128")
        if count(loop, "LDG") in (0, points) and not count(loop, "STG") and _has_terms(loop, points):
            found.append((loop, points))
    for loop in innermost_loops(code, "LDG", "E"):
        if (elements := count(loop, "LDG")) == count(loop, "STS") > 1 and not count(loop, "STG"):
            found.append((loop, elements))
    return found


def _has_terms(loop: Sequence[Instruction], elements: int) -> bool:
    """Whether a loop computes, rather than copies, and without alternatives."""
    return count(loop, *_ARITHMETIC) >= 8 * elements and not has_alternatives(loop)


def joint_rows(arch: str, name: str, code: Sequence[Instruction]) -> Iterator[tuple[str, bool, int, Loop]]:
    """Label, whether the loop reads from memory, bytes of an element and the loop, for each row of a joint kernel."""
    kind, element, _, last, _, number = _KERNEL.match(name).groups()
    size = _DTYPES[element][1]
    points = (32 if last == "1" else 16) // _COMPONENTS
    for tensors, stores, reads, wanted in _JOINT_PASSES[kind, number]:
        loops = chunk_loops(code, size, tensors) if kind == "reduce" else channel_loops(code, points, tensors, stores)
        require(arch, name, wanted, size * tensors, size * stores, len(loops))
        for label, loop in zip(wanted, loops, strict=True):
            # Detached weights have no gradient: no loop before this one has read what it works on.
            fetched = reads or "detached" in label
            yield label, fetched, size * (tensors * fetched + stores), loop
    if kind == "weigh":
        wanted = _JOINT_MOMENTS[: 1 if last == "1" else 2]
        loops = moment_loops(code)
        require(arch, name, wanted, 0, 0, len(loops))
        yield from ((label, False, 0, loop) for label, loop in zip(wanted, loops, strict=True))


def elements_of(loop: Sequence[Instruction]) -> int:
    """Elements in one turn: with bounded log-odds one component needs no exponential."""
    return count(loop, "MUFU", modifier="EX2") // (_COMPONENTS - 1)


def rows_of_kernel(arch: str, name: str, code: list[Instruction], register_count: int, stack: int) -> Iterator[SassRow]:
    """A row for each plain loop: a turn executes all its instructions."""
    kind, element, _, last, posterior, number = _KERNEL.match(name).groups()
    dtype, size = _DTYPES[element]
    found: list[tuple[str, bool, int, Loop]] = []  # label, whether it reads from memory, bytes of an element, loop
    if posterior == "Joint":
        found += joint_rows(arch, name, code)
    else:
        tensors, *labels = _PASSES[number]
        for fetches, stores in _LOOPS[kind]:
            wanted, loaded, stored = labels[stores], size * tensors * fetches, size * stores
            loops = plain_loops(code, loaded, stored)
            require(arch, name, wanted, loaded, stored, len(loops))
            for label, loop in zip(wanted, loops, strict=True):
                found.append((label, kind != "resident", loaded + stored, (loop, elements_of(loop))))
    for label, streams, moved, (loop, elements) in found:
        yield SassRow(
            arch=arch,
            dtype=dtype,
            layout="channels_last" if last == "1" else "contiguous",
            path="streaming" if streams else "on chip",
            name=label,
            instructions=len(loop) / elements,
            mufu=count(loop, "MUFU") / elements,
            memory=count(loop, "LDG", "LDGSTS", "STG") / elements,
            shared=count(loop, "LDS", "STS") / elements,
            bytes=moved,
            elements=elements,
            registers=register_count,
            stack=stack,
        )


def require(arch: str, name: str, wanted: Sequence[str], loaded: int, stored: int, found: int) -> None:
    """Raise RuntimeError unless as many loops were found in a kernel as there are rows for it."""
    if found != len(wanted):
        raise RuntimeError(
            f"{name}, {arch}: expected {len(wanted)} plain loops that load {loaded} and store {stored} bytes an "
            f"element ({'; '.join(wanted)}), found {found}"
        )


def make_report(arch: str, rows: list[SassRow]) -> Report:
    """The rows of one architecture beside the plan."""
    environment = {"device": arch, **versions(torch, cbn_ext)}
    header = ("layout, dtype", "path", "pass", "instructions", "planned", "MUFU", "planned", "memory", "shared")
    header += ("bytes", "issue ps", "MUFU ps", "DRAM ps", "elements", "registers", "stack")
    sections: dict[str, list[list[str]]] = defaultdict(list)
    for row in rows:
        instructions, mufu = PLANNED.get(row.name, ("", ""))
        label = f"{row.layout} {row.dtype}"
        counts = f"{row.instructions:.1f}", str(instructions), f"{row.mufu:.2f}", str(mufu)
        bounds = row.instructions * ISSUE_PS, row.mufu * MUFU_PS, row.bytes * BYTE_PS
        sections[label].append(
            [
                *(label, row.path, row.name, *counts, f"{row.memory:.2f}", f"{row.shared:.2f}", str(row.bytes)),
                *(f"{bound:.2f}" for bound in bounds),
                *(str(row.elements), str(row.registers), str(row.stack)),
            ]
        )
    return Report(
        kind="sass",
        environment=environment,
        facts="Machine code for {device}, compiled beside torch {torch}, cbn_ext {cbn_ext}; {date}.".format(
            **environment
        ),
        csv={"": rows},
        tables=[Table(f"An element of four components, {arch}", header, list(sections.values()))],
        text=_HOW,
    )


_HOW = f"""## How this was counted

- A row is one loop over elements, the plain one that most layers take: bounded log-odds, whole chunks, no ReLU, no
  residual, no groups. A turn executes all its instructions, divided here by the elements that a thread takes in it; the
  loop's own instructions are among them. What a block does before and after the loop is not.
- *planned*: instructions of trial kernels that held the formulas alone, and the special-function operations they need.
- *joint*: the passes of one mixture over the channels of a point, which needs no exponentials an element. *weights* and
  *gradient of the weights* are sums over the channels of each point, of which a loop over the same points then finds x
  in the cache: *moments* (contiguous elements change their places among the lanes first: *exchange*) and *input
  gradient*. *statistics* is the pass in place of *moments* where a point has too many channels. Weights are not among
  the bytes: M numbers a point, whatever the number of channels.
- *memory*, *shared*: instructions that access global and shared memory. *bytes*: moved to and from global memory.
- ps: at an H200's 1.98 GHz and 4.3 TB/s, where an instruction takes {ISSUE_PS:.3f} ps, a special-function operation
  {MUFU_PS:.2f} ps and a byte {BYTE_PS:.3f} ps. The largest of the three bounds a pass from below.
- *on chip*: both passes in one kernel, whose registers both rows name; the second reads what the first one kept in
  shared memory, in joint mode in the cache."""
