"""The kernels of the CUDA library and their loops over elements, in machine code."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.sass.code import Instruction, accessed, count, has_alternatives, innermost_loops, is_unguarded

#: Compiled numbers of components that are counted.
COMPONENTS = 4, 8

#: What the loops of one pass do: bounded log-odds and nothing beside the pass, a ReLU, or the sum with a residual and a
#: ReLU with a mask; other log-odds and nothing beside the pass.
FORMS = PLAIN, RELU, SUM, UNBOUNDED = "plain", "ReLU", "sum and ReLU", "unbounded"
#: By whether the log-odds are bounded and the loop accesses a mask: the forms of such loops, the shortest first.
_FORMS = {(True, False): [PLAIN, RELU], (True, True): [SUM], (False, False): [UNBOUNDED]}


class Pass(NamedTuple):
    """A pass over the elements in channel mode. loads, stores: tensors like x. forms: of its loops without guards."""

    name: str
    loads: int
    stores: int
    forms: Sequence[str] = FORMS


#: By the number of a kernel's pass.
PASSES = {
    "0": Pass("statistics", 1, 0, (PLAIN, UNBOUNDED)),
    "1": Pass("normalise", 1, 1),
    "2": Pass("backward reduction", 2, 0),
    "4": Pass("input gradient, p detached", 2, 1),
    "3": Pass("input gradient", 2, 1),
}
#: Of a kernel with both passes, by its number: the passes that have a row. The two gradients share their first pass.
_ON_CHIP = {"1": ["0", "1"], "3": ["2", "3"], "4": ["4"]}

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

#: The names of all rows in order.
NAMES = [
    *(each.name for each in PASSES.values()),
    *(name for loops in _JOINT_PASSES.values() for *_, names in loops for name in names),
    *_JOINT_MOMENTS,
]

# Of kernels in several forms those for whole chunks.
_KERNEL = re.compile(
    r"_ZN3cbn\d+(\w+)_kernelINS_6ConfigI(f|N3c104HalfE|N3c108BFloat16E)Li(\d+)ELb([01])E"
    r"NS_\d+(Channel|Joint)PosteriorEEE(?:LNS_4PassE(\d)E)?(?:LNS_5FormsE0E)?EEv"
)
_DTYPES = {"f": ("float32", 4), "N3c104HalfE": ("float16", 2), "N3c108BFloat16E": ("bfloat16", 2)}


class Kernel(NamedTuple):
    """A kernel that is counted. number: of its pass, if it has one. size: bytes of an element."""

    arch: str
    mangled: str
    kind: str
    dtype: str
    size: int
    components: int
    channels_last: bool
    joint: bool
    number: str | None


class Loop(NamedTuple):
    """A loop over elements. elements: of a thread in one turn. moved: bytes an element, to and from global memory.

    streams: it reads from global memory what it works on.
    """

    name: str
    form: str
    streams: bool
    moved: int
    elements: int
    code: Sequence[Instruction]

    @property
    def instructions(self) -> float:
        """Of one element."""
        return len(self.code) / self.elements


def counted(arch: str, mangled: str) -> Kernel | None:
    """The kernel of a name; None for one that is not counted, such as one that works on channels, not on elements."""
    found = _KERNEL.match(mangled)
    if not found:
        return None
    kind, element, components, last, posterior, number = found.groups()
    kernel = Kernel(arch, mangled, kind, *_DTYPES[element], int(components), last == "1", posterior == "Joint", number)
    known = (kind, number) in _JOINT_PASSES if kernel.joint else kind in ("reduce", "map", "resident")
    return kernel if known and kernel.components in COMPONENTS else None


def loops_of(kernel: Kernel, code: Sequence[Instruction]) -> Iterator[Loop]:
    """The loops that have a row.

    Raises:
        RuntimeError: there are others than expected.
    """
    if kernel.joint:
        yield from joint_loops(kernel, code)
    else:
        yield from (on_chip_loops if kernel.kind == "resident" else streaming_loops)(kernel, code)


def prologue(code: Sequence[Instruction]) -> int:
    """Instructions before the first loop over elements."""
    loops = (loop for loop in innermost_loops(code, "FFMA") if computes(loop))
    return min((code.index(loop[0]) for loop in loops), default=len(code))


def computes(loop: Sequence[Instruction], elements: int = 1) -> bool:
    """True for a loop that works on elements rather than copies them."""
    return count(loop, "FADD", "FMUL", "FFMA") >= 8 * elements


def require(kernel: Kernel, wanted: Sequence[str], found: int) -> None:
    """Raise RuntimeError unless as many loops were found in a kernel as there are rows for it."""
    if found != len(wanted):
        raise RuntimeError(
            f"{kernel.mangled}, {kernel.arch}: expected {len(wanted)} loops ({'; '.join(wanted)}), found {found}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Channel mode: an element has M - 1 exponentials where the log-odds are bounded, else M
# ----------------------------------------------------------------------------------------------------------------------


def is_bounded(loop: Sequence[Instruction], components: int) -> bool:
    """True where the log-odds are bounded; a turn's elements are a power of two, which M - 1 does not divide."""
    return count(loop, "MUFU", modifier="EX2") % (components - 1) == 0


def elements_of(loop: Sequence[Instruction], components: int) -> int:
    """Elements of one turn."""
    return count(loop, "MUFU", modifier="EX2") // (components - is_bounded(loop, components))


def accesses_mask(loop: Sequence[Instruction]) -> bool:
    """True for the sum's form: no tensor has elements of a byte."""
    return count(loop, "LDG", "STG", modifier="U8") > 0


def streaming_loops(kernel: Kernel, code: Sequence[Instruction]) -> Iterator[Loop]:
    """The loops whose chunks all exist, in each form; those for the last chunks guard their accesses."""
    its = PASSES[kernel.number]
    found = defaultdict(list)
    for loop in innermost_loops(code, "MUFU", "EX2"):
        masked, elements = accesses_mask(loop), elements_of(loop, kernel.components)
        # A map of the sum has the residual or its gradient beside what the others have.
        moved = kernel.size * (its.loads + its.stores + its.stores * masked)
        if is_unguarded(loop) and accessed([i for i in loop if i.bits > 8], "LDG", "STG") == moved * elements:
            key = is_bounded(loop, kernel.components), masked
            found[key].append(Loop(its.name, PLAIN, True, moved, elements, loop))
    for key, forms in _FORMS.items():
        wanted = [form for form in forms if form in its.forms]
        require(kernel, [f"{its.name}, {form}" for form in wanted], len(found[key]))
        for form, loop in zip(wanted, sorted(found[key], key=lambda loop: loop.instructions), strict=True):
            yield loop._replace(form=form)


def on_chip_loops(kernel: Kernel, code: Sequence[Instruction]) -> Iterator[Loop]:
    """The plain loops of the pass that reads from global memory, and of the one that stores."""
    for number in _ON_CHIP[kernel.number]:
        its = PASSES[number]
        found = [
            loop
            for loop in innermost_loops(code, "MUFU", "EX2")
            if is_bounded(loop, kernel.components)
            and not accesses_mask(loop)
            and (count(loop, "STG") > 0) == its.stores
        ]
        wanted = [f"{its.name}, {form}" for form in _FORMS[True, False] if form in its.forms]
        require(kernel, wanted, len(found))
        plain = min(found, key=len)
        moved = kernel.size * (its.stores or its.loads)
        yield Loop(its.name, PLAIN, False, moved, elements_of(plain, kernel.components), plain)


# ----------------------------------------------------------------------------------------------------------------------
# Joint mode: no exponentials an element, weights are read
# ----------------------------------------------------------------------------------------------------------------------

# Elements of a turn, and the turn.
Turn = tuple[int, Sequence[Instruction]]


def joint_loops(kernel: Kernel, code: Sequence[Instruction]) -> Iterator[Loop]:
    """The plain loops."""
    for tensors, stores, reads, wanted in _JOINT_PASSES[kernel.kind, kernel.number]:
        if kernel.kind == "reduce":
            turns = chunk_turns(kernel, code, tensors)
        else:
            turns = channel_turns(kernel, code, tensors, stores)
        require(kernel, wanted, len(turns))
        for name, turn in zip(wanted, turns, strict=True):
            # Detached weights have no gradient: no loop before this one has read what it works on.
            streams = reads or "detached" in name
            yield Loop(name, PLAIN, streams, kernel.size * (tensors * streams + stores), *turn)
    if kernel.kind == "weigh":
        wanted = _JOINT_MOMENTS[: 1 if kernel.channels_last else 2]
        turns = moment_turns(kernel, code)
        require(kernel, wanted, len(turns))
        yield from (Loop(name, PLAIN, False, 0, *turn) for name, turn in zip(wanted, turns, strict=True))


def chunk_turns(kernel: Kernel, code: Sequence[Instruction], tensors: int) -> list[Turn]:
    """Loops over whole chunks of so many tensors and the weights of their points."""
    # In channels_last two channels share a point's weights.
    bytes_of_element = kernel.size * tensors + 4 * kernel.components // (2 if kernel.channels_last else 1)
    turns = [(accessed(loop, "LDG") // bytes_of_element, loop) for loop in innermost_loops(code, "LDG")]
    return [(n, loop) for n, loop in turns if n > 0 and computes(loop, n) and is_unguarded(loop)]


def channel_turns(kernel: Kernel, code: Sequence[Instruction], tensors: int, stores: bool) -> list[Turn]:
    """Loops over the channels of a thread's points, the shortest first.

    They load one element at a time, and beside a channel's coefficients its origin.

    tensors: how many are loaded. stores: whether an element is stored for each.
    """
    points = (32 if kernel.channels_last else 16) // kernel.components
    found = []
    for loop in innermost_loops(code, "LDG", "128"):
        narrow = count(loop, "LDG") - count(loop, "LDG", modifier="128")
        fits = narrow == points * tensors + 1 and count(loop, "STG") == points * stores
        if fits and computes(loop, points) and not has_alternatives(loop):
            found.append((points, loop))
    return sorted(found, key=lambda turn: len(turn[1]))


def moment_turns(kernel: Kernel, code: Sequence[Instruction]) -> list[Turn]:
    """The loop over points that sums moments; contiguous also the one that exchanges elements among the lanes."""
    found = []
    for loop in innermost_loops(code, "LDS", "128"):
        points = 4 * count(loop, "LDS", modifier="128") // kernel.components
        fits = count(loop, "LDG") in (0, points) and not count(loop, "STG")
        if fits and computes(loop, points) and not has_alternatives(loop):
            found.append((points, loop))
    for loop in innermost_loops(code, "LDG", "E"):
        if (elements := count(loop, "LDG")) == count(loop, "STS") > 1 and not count(loop, "STG"):
            found.append((elements, loop))
    return found
