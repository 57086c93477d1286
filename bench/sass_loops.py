"""Loops in machine code (SASS), and what one turn of a loop executes on its usual path.

A loop over elements also has code for inputs that are not aligned, masks and more, which branches pass over. Its usual
path is the shortest one among those that do its work: all exponentials, and accesses to global memory of full width.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)([^;]*);")
_ARITHMETIC = ("FADD", "FMUL", "FFMA")


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
        return next((int(modifier) for modifier in self.modifiers if modifier in ("64", "128")), 32)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The functions in a disassembler's output, by their mangled names."""
    functions: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if function := _FUNCTION.match(line):
            code = functions.setdefault(function[1], [])
        elif found := _INSTRUCTION.match(line):
            address, predicate, name, modifiers, operands = found.groups()
            *conditions, last = operands.split(",")
            target = int(last, 16) if name == "BRA" and last.strip().startswith("0x") else None
            always = predicate is None and not (name == "BRA" and conditions)
            code.append(Instruction(int(address, 16), name, tuple(modifiers.split(".")[1:]), target, always))
    return functions


class Work(NamedTuple):
    """What one turn of a loop may do: exponentials; loads and stores of full width; optional arithmetic.

    The latter counts stretches of nothing but additions and multiplications that a branch can pass over.
    """

    exponentials: int = 0
    loads: int = 0
    stores: int = 0
    optional: int = 0


class Cost(NamedTuple):
    """Instructions that one turn executes, and those of them for special functions, shared and global memory."""

    instructions: int = 0
    mufu: int = 0
    shared: int = 0
    memory: int = 0


def count(code: Sequence[Instruction], name: str, modifier: str | None = None) -> int:
    """Instructions of this name and modifier."""
    return sum(i.name == name and (modifier is None or modifier in i.modifiers) for i in code)


def innermost_loops(code: Sequence[Instruction], name: str, modifier: str) -> list[Sequence[Instruction]]:
    """Stretches with such an instruction that end with a branch back to their start, and hold no other such stretch."""
    index = {instruction.address: number for number, instruction in enumerate(code)}
    spans = [(index[i.target], end) for end, i in enumerate(code) if i.target in index and index[i.target] < end]
    spans = [(start, end) for start, end in spans if count(code[start : end + 1], name, modifier)]
    return [
        code[first : last + 1]
        for first, last in spans
        if not any(first <= start and end <= last and (start, end) != (first, last) for start, end in spans)
    ]


def usual_paths(loop: Sequence[Instruction], bits: int) -> dict[Work, Cost]:
    """For every amount of work that one turn of a loop may do, the cost of the path with the fewest instructions.

    Loops within the loop are gone through once, or passed over.

    bits: the full width of an access.
    """
    starts = {loop[0].address} | {i.target for i in loop if i.target is not None}
    starts |= {following.address for i, following in pairwise(loop) if _leaves(i)}
    reached: dict[int, dict[Work, Cost]] = {loop[0].address: {Work(): Cost()}}
    block: list[Instruction] = []
    optional = False  # whether the block begins behind a branch that can pass it over
    for instruction, following in zip(loop, [*loop[1:], None], strict=True):
        block.append(instruction)
        if following is not None and following.address not in starts:
            continue
        before = reached.pop(block[0].address, {})
        paths = {_sum(work, _work(block, bits, optional)): _sum(cost, _cost(block)) for work, cost in before.items()}
        if following is None:
            return paths
        targets = [instruction.target] if _leaves(instruction) else []
        if not (_leaves(instruction) and instruction.always):
            targets.append(following.address)
        for target in targets:
            if target is not None and target > instruction.address:
                there = reached.setdefault(target, {})
                for work, cost in paths.items():
                    there[work] = min(cost, there.get(work, cost))
        optional = instruction.target is not None and not instruction.always
        block = []
    return {}


def _leaves(instruction: Instruction) -> bool:
    return instruction.target is not None or instruction.name in ("EXIT", "RET")


def _work(block: Sequence[Instruction], bits: int, optional: bool) -> Work:
    full = [i for i in block if i.always and i.bits == bits]
    return Work(
        count(block, "MUFU", "EX2"),
        count(full, "LDGSTS"),
        count(full, "STG"),
        int(optional and all(i.name in _ARITHMETIC for i in block)),
    )


def _cost(block: Sequence[Instruction]) -> Cost:
    shared = count(block, "LDS") + count(block, "STS")
    memory = count(block, "LDG") + count(block, "LDGSTS") + count(block, "STG")
    return Cost(len(block), count(block, "MUFU"), shared, memory)


def _sum(one: NamedTuple, other: NamedTuple) -> NamedTuple:
    return type(one)(*map(sum, zip(one, other, strict=True)))
