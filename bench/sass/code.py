"""Loops in machine code (SASS), and what they load and store."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)([^;]*);")


class Instruction(NamedTuple):
    """An instruction: its address, its name and modifiers; where it branches to; whether it has no condition."""

    address: int
    name: str
    modifiers: tuple[str, ...] = ()
    target: int | None = None
    always: bool = True

    @property
    def bits(self) -> int:
        """Width of a memory access."""
        return next((_WIDTHS[modifier] for modifier in self.modifiers if modifier in _WIDTHS), 32)


def parse(lines: Iterable[str]) -> dict[str, list[Instruction]]:
    """The functions in a disassembler's output, by their mangled names."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in lines:
        if function := _FUNCTION.match(line):
            code = functions.setdefault(function[1], [])
        elif found := _INSTRUCTION.match(line):
            address, predicate, name, modifiers, operands = found.groups()
            *conditions, last = operands.split(",")
            target = int(last, 16) if name == "BRA" and last.strip().startswith("0x") else None
            always = predicate is None and not (name == "BRA" and conditions)
            code.append(Instruction(int(address, 16), name, tuple(modifiers.split(".")[1:]), target, always))
    return functions


def count(code: Sequence[Instruction], *names: str, modifier: str | None = None) -> int:
    """Instructions of one of these names, with this modifier."""
    return sum(i.name in names and (modifier is None or modifier in i.modifiers) for i in code)


def innermost_loops(code: Sequence[Instruction], name: str, modifier: str | None = None) -> list[Sequence[Instruction]]:
    """Stretches with such an instruction that end with a branch back to their start, and hold no other such stretch."""
    index = {instruction.address: number for number, instruction in enumerate(code)}
    spans = [(index[i.target], end) for end, i in enumerate(code) if i.target in index and index[i.target] < end]
    spans = [(start, end) for start, end in spans if count(code[start : end + 1], name, modifier=modifier)]
    return [
        code[first : last + 1]
        for first, last in spans
        if not any(first <= start and end <= last and (start, end) != (first, last) for start, end in spans)
    ]


def accessed(code: Sequence[Instruction], *names: str) -> int:
    """Bytes that memory accesses of these names, each executed once, load or store."""
    return sum(i.bits for i in code if i.name in names) // 8


def is_unguarded(loop: Sequence[Instruction]) -> bool:
    """True where every turn executes all of the loop and loads all that it names: no element may be missing."""
    return count(loop, "BRA") == 1 and all(i.always for i in loop if i.name == "LDG")


def has_alternatives(loop: Sequence[Instruction]) -> bool:
    """True where no turn of the loop executes all of it, because a branch leads past the other arm of a condition."""
    return any(i.name == "BRA" and i.always for i in loop[:-1])
