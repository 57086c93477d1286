"""Counting the instructions of a loop's usual path, on machine code small enough to count by hand."""

import csv
import re
from pathlib import Path

import pytest
from rich.console import Console

from bench import sass
from bench.sass_loops import Cost, Instruction, Work, count, innermost_loops, parse, usual_paths


def kernel(name: str, number: int, element: str = "f", last: int = 0, components: int = 4) -> str:
    """A mangled name: reduce, map or resident kernel of a pass."""
    name = f"{name}_kernel"
    return (
        f"_ZN3cbn{len(name)}{name}INS_6ConfigI{element}Li{components}ELb{last}EEELNS_4PassE{number}EEEvNS_9ArgumentsE"
    )


def assembled(name: str, code: str) -> str:
    """Lines as the disassembler prints them, each with its address; `label:` stands before what has its address."""
    labels, instructions = {}, []
    for line in code.split("\n"):
        *before, line = (part.strip() for part in line.split(":"))
        if before:
            labels[before[0]] = 16 * len(instructions)
        if line:
            instructions.append(line)
    lines = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for number, line in enumerate(instructions):
        for label, address in labels.items():
            line = line.replace(f"BRA {label}", f"BRA {address:#x}").replace(f", {label}", f", {address:#x}")
        lines.append(f"        /*{16 * number:04x}*/                   {line} ;  /* 0x0000000000007918 */")
        lines.append("                                                        /* 0x000fe20000000000 */")
    return "\n".join(lines) + "\n"


#: What a map kernel does with four float32 elements: fetches two tensors, stores one; with an optional covariance.
ELEMENT = """
 MUFU.EX2 R1, R1
 MUFU.EX2 R2, R2
 MUFU.EX2 R3, R3
 MUFU.RCP R4, R4
@!P0 BRA skip{0}
 FADD R5, R5, -R6.reuse
 FFMA R5, R5, R7, RZ
skip{0}: FMUL R8, R8, R4
@!P2 BRA kept{0}
 FSETP.GT.AND P3, PT, R8, RZ, PT
 FADD R8, R8, R8
kept{0}: FADD R9, R9, R8
"""


def map_kernel(prefix: str = "") -> str:
    elements = "".join(ELEMENT.format(n) for n in range(4))
    return f"""
 MOV R1, c[0x0][0x28]
loop: ISETP.GE.AND P1, PT, R0, R2, PT
@P1 BRA fetched
@P4 BRA P5, slow
 LDGSTS.E.BYPASS.128 [R14+0x1f0], desc[UR36][R4.64]
 LDGSTS.E.BYPASS.128 [R15+0x1f0], desc[UR36][R6.64]
 BRA fetched
slow: LDG.E R4, desc[UR36][R4.64]
 STS [R14+0x1f0], R4
@P0 LDGSTS.E.BYPASS.128 [R14+0x1f0], desc[UR36][R4.64]
 BRA fetched
fetched: LDGDEPBAR
 LDS.128 R4, [R4+0x1f0]
 LDS.128 R8, [R8+0x1f0]
{prefix}
{elements}
@P6 BRA unaligned
 STG.E.EF.128 desc[UR36][R4.64], R64
 BRA stored
unaligned: STG.E.EF.64 desc[UR36][R4.64], R64
 STG.E.EF.64 desc[UR36][R4.64], R66
stored: VIADD R0, R0, 0x1
@!P2 BRA loop
 EXIT
trap: BRA trap
"""


MAP = kernel("map", 3)
# ISETP, BRA, BRA, two fetches, BRA; LDGDEPBAR, two LDS; four elements of 8 instructions that are not passed over;
# BRA, STG, BRA; VIADD, BRA. The covariance adds 2 for each element.
DETACHED = 6 + 3 + 4 * 8 + 3 + 2
WORK = Work(exponentials=12, loads=2, stores=1)


def test_instructions_are_parsed():
    (code,) = parse(
        assembled("f", "@P0 BRA P1, end\n LDG.E.64 R2, desc[UR4][R2.64]\nend: BRA end\n@!UP0 EXIT")
    ).values()
    assert code == [
        Instruction(0x00, "BRA", (), 0x20, False),
        Instruction(0x10, "LDG", ("E", "64"), None, True),
        Instruction(0x20, "BRA", (), 0x20, True),
        Instruction(0x30, "EXIT", (), None, False),
    ]
    assert [instruction.bits for instruction in code] == [32, 64, 32, 32]


def test_functions_are_told_apart():
    functions = parse(assembled("one", "NOP") + assembled("two", "NOP\nEXIT"))
    assert {name: len(code) for name, code in functions.items()} == {"one": 1, "two": 2}


def test_loops_are_those_that_hold_an_instruction_and_no_other_such_loop():
    lines = "outer: NOP\ninner: MUFU.EX2 R1, R1\nragged: NOP\n@P0 BRA ragged\n@P1 BRA inner\nNOP\n@P2 BRA outer"
    code = parse(assembled("f", lines + "\nself: BRA self"))["f"]
    assert [[i.address for i in loop] for loop in innermost_loops(code, "MUFU", "EX2")] == [[0x10, 0x20, 0x30, 0x40]]


def test_the_usual_path_does_all_work_with_the_fewest_instructions():
    code = parse(assembled(MAP, map_kernel()))[MAP]
    (loop,) = innermost_loops(code, "MUFU", "EX2")
    paths = usual_paths(loop, 128)
    assert paths[WORK] == Cost(DETACHED, mufu=16, shared=2, memory=3)
    assert paths[WORK._replace(optional=4)] == Cost(DETACHED + 8, mufu=16, shared=2, memory=3)
    # Nothing is fetched in the last turns; unaligned stores are not of full width.
    assert paths[Work(12, 0, 1)].instructions == DETACHED - 4
    assert paths[Work(12, 2, 0)].instructions == DETACHED
    assert max(work.exponentials for work in paths) == 12


def test_a_path_does_not_go_on_behind_an_exit():
    code = parse(assembled("f", "loop: NOP\n@P0 BRA more\n EXIT\nmore: NOP\nNOP\n@P1 BRA loop"))["f"]
    assert usual_paths(code, 128) == {Work(): Cost(5)}


def rows(code: str, name: str = MAP, **changes) -> dict[str, sass.SassRow]:
    found = sass.rows_of_kernel("sm_90", name, parse(assembled(name, code))[name], 108, 0)
    return {row.name: row for row in found}


def test_rows_of_the_input_gradient():
    found = rows(map_kernel())
    assert list(found) == ["input gradient, p detached", "input gradient"]
    assert found["input gradient, p detached"] == sass.SassRow(
        "sm_90", "float32", "contiguous", "streaming", "input gradient, p detached",
        DETACHED / 4, 4.0, 0.75, 0.5, 12, 4, 108, 0,
    )  # fmt: skip
    assert found["input gradient"].instructions == DETACHED / 4 + 2


def test_loops_of_bounded_odds_are_counted():
    # The loop for unbounded odds has one exponential more for each element.
    unbounded = map_kernel("MUFU.EX2 R0, R0\n" * 4)
    unbounded = re.sub(r"\b(loop|fetched|slow|stored|unaligned|skip\d|kept\d)\b", r"other_\1", unbounded)
    both = unbounded.replace(" EXIT\ntrap: BRA trap\n", "") + map_kernel()
    assert rows(both) == rows(map_kernel())


@pytest.mark.parametrize(
    ("element", "last", "dtype", "layout", "size"),
    [("N3c104HalfE", 0, "float16", "contiguous", 2), ("N3c108BFloat16E", 1, "bfloat16", "channels_last", 2)],
)
def test_narrow_elements_and_layouts(element, last, dtype, layout, size):
    # Four elements are 8 bytes: accesses of 64 bits are the full ones.
    code = map_kernel().replace("BYPASS.128", "64").replace("EF.128", "EF.64", 1)
    row = rows(code, kernel("map", 3, element, last))["input gradient"]
    assert (row.dtype, row.layout, row.bytes, row.elements) == (dtype, layout, 3 * size, 4)


def test_both_passes_of_a_kernel_on_chip():
    fetch = "loop: NOP\n LDGSTS.E.BYPASS.128 [R1], desc[UR36][R4.64]\n" + 12 * "MUFU.EX2 R1, R1\n" + "@P0 BRA loop\n"
    store = "next: NOP\n" + 12 * "MUFU.EX2 R1, R1\n" + "STG.E.128 desc[UR36][R4.64], R4\n@P0 BRA next\n"
    found = rows(fetch + store + "EXIT", kernel("resident", 1))
    assert {n: (r.path, r.instructions, r.bytes) for n, r in found.items()} == {
        "statistics": ("on chip", 15 / 4, 4),
        "normalise": ("on chip", 15 / 4, 4),
    }


def test_a_loop_without_the_expected_accesses_is_an_error():
    with pytest.raises(RuntimeError, match=r"sm_90: expected a path through a loop that does \(12, 2, 1\), found none"):
        rows(map_kernel().replace("EF.128", "EF.32"))
    with pytest.raises(RuntimeError, match="sm_90: expected a loop with exponentials, found none"):
        rows(map_kernel().replace("MUFU.EX2", "MUFU.LG2"))


def test_registers_are_read():
    text = f" Function {MAP}:\n  REG:108 STACK:16 SHARED:1024 LOCAL:0\n Function other:\n  REG:12 STACK:0 SHARED:0\n"
    assert sass.registers(text) == {MAP: (108, 16), "other": (12, 0)}


def test_report_of_every_architecture(monkeypatch, tmp_path):
    calls = []

    def call(tool, *arguments):
        calls.append(arguments)
        if arguments[0] == "--list-elf":
            return "ELF file    1: _C_cuda.1.sm_80.cubin\nELF file    2: _C_cuda.2.sm_90.cubin\n"
        if arguments[0] == "-res-usage":
            names = (MAP, kernel("map", 3, components=8), kernel("map", 3, "d"), "other")
            return "".join(f" Function {name}:\n  REG:108 STACK:0 SHARED:1024\n" for name in names)
        return assembled(MAP, map_kernel())

    monkeypatch.setattr(sass, "_call", call)
    monkeypatch.setattr(sass, "find_disassembler", lambda: "cuobjdump")
    sass.run(Console(quiet=True), Path("library.so"), tmp_path)
    assert [arguments[2:] for arguments in calls if arguments[0] == "-sass"] == [
        ("sm_80", "-fun", MAP, "library.so"),
        ("sm_90", "-fun", MAP, "library.so"),
    ]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"sass-sm-{number}{ending}" for number in (80, 90) for ending in (".csv", ".md")}
    with (tmp_path / "sass-sm-90.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["name"], first["instructions"], first["registers"]) == ("input gradient, p detached", "11.5", "108")
    assert float(second["instructions"]) == 13.5
    cells = "| contiguous float32 | streaming | input gradient | 13.5 | 53 | 4.00 | 4 | 0.75 | 0.50 | 12 | 0.40 |"
    assert cells in (tmp_path / "sass-sm-90.md").read_text()


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sass, "_call", lambda *arguments: "")
    monkeypatch.setattr(sass, "find_disassembler", lambda: "cuobjdump")
    with pytest.raises(RuntimeError, match=r"expected machine code in library\.so, found none"):
        sass.run(Console(quiet=True), Path("library.so"), tmp_path)
    with pytest.raises(RuntimeError, match=r"expected kernels of 4 components for sm_90 in library\.so, found none"):
        list(sass.rows_of("cuobjdump", Path("library.so"), "sm_90"))
    monkeypatch.setattr("cbn_ext.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"expected the CUDA library _C_cuda\*\.so in"):
        sass.find_library()


def test_the_disassembler_is_found_and_its_errors_shown(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"expected cuobjdump in {tmp_path}/bin or on PATH; found none"):
        sass.find_disassembler()
    tool = tmp_path / "bin" / "cuobjdump"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho no such file >&2\nexit 3\n")
    tool.chmod(0o755)
    assert sass.find_disassembler() == str(tool)
    with pytest.raises(RuntimeError, match="cuobjdump --list-elf failed: no such file"):
        sass.run(Console(quiet=True), Path("library.so"), tmp_path)


def test_counting_by_modifier():
    code = parse(assembled("f", "MUFU.EX2 R1, R1\nMUFU.RCP R1, R1\nFADD R1, R1, R1"))["f"]
    assert (count(code, "MUFU"), count(code, "MUFU", "EX2"), count(code, "FMUL")) == (2, 1, 0)
