"""Finding and counting the plain loops of kernels, on machine code small enough to count by hand."""

import csv
from pathlib import Path

import pytest

from bench.sass import report, tools
from bench.sass.code import Instruction, accessed, count, has_alternatives, innermost_loops, parse


def kernel(name: str, number: int, element: str = "f", last: int = 0, components: int = 4) -> str:
    """A mangled name: reduce, map or resident kernel of a pass."""
    name = f"{name}_kernel"
    config = f"{element}Li{components}ELb{last}ENS_16ChannelPosteriorEEE"
    return f"_ZN3cbn{len(name)}{name}INS_6ConfigI{config}LNS_4PassE{number}EEEvNS_9ArgumentsE"


def assembled(name: str, code: str) -> list[str]:
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
        *operands, last = line.split(" ")
        line = " ".join([*operands, f"{labels[last]:#x}" if last in labels else last])
        lines.append(f"        /*{16 * number:04x}*/                   {line} ;  /* 0x0000000000007918 */")
        lines.append("                                                        /* 0x000fe20000000000 */")
    return lines


def joint_kernel(name: str, number: int | None = None, element: str = "f", last: int = 0) -> str:
    """The same of joint mode, whose passes over the channels of points have no number."""
    name = f"{name}_kernel"
    template = "" if number is None else f"LNS_4PassE{number}E"
    config = f"INS_6ConfigI{element}Li4ELb{last}ENS_14JointPosteriorEEE{template}EEvNS_9ArgumentsE"
    return f"_ZN3cbn{len(name)}{name}{config}"


MAP = kernel("map", 3)

# In the loops below a thread takes four elements in one turn.
ELEMENT = """
 MUFU.EX2 R1, R1
 MUFU.EX2 R2, R2
 MUFU.EX2 R3, R3
 MUFU.RCP R4, R4
 FADD R5, R5, -R6.reuse
"""


def plain_loop(label: str, load: str = "", store: str = "", more: str = "") -> str:
    """A loop as plain ones are: of 25 instructions, and those given."""
    return f"""
{label}: ISETP.GE.AND P1, PT, R0, R2, PT
@P1 BRA {label}_fetched
{load}
{label}_fetched: LDS.128 R4, [R4+0x1f0]
{4 * ELEMENT}
{more}
{store}
 VIADD R0, R0, 0x1
@!P2 BRA {label}
"""


def general_loop(label: str, load: str = "", store: str = "", more: str = "") -> str:
    """The same with narrow accesses for what is not aligned."""

    def either(arm: str, access: str) -> str:
        return f"@P3 BRA {arm}\n{access} BRA {arm}_joins\n{arm}: NOP\n{access.replace('.128', '')}{arm}_joins: NOP"

    return plain_loop(label, either(f"{label}_loads", load), either(f"{label}_stores", store), more)


FETCH = " LDGSTS.E.BYPASS.128 [R14+0x1f0], desc[UR36][R4.64]\n"
STORE = "@!P0 STG.E.EF.128 desc[UR36][R4.64], R64\n"
END = " EXIT\ntrap: BRA trap\n"
UNBOUNDED = 4 * "MUFU.EX2 R0, R0\n"
COVARIANCE = 8 * "FFMA R5, R5, R7, RZ\n"
DETACHED = 25 + 2 + 1  # two fetches and a store


def map_kernel(fetch: str = FETCH, store: str = STORE) -> str:
    """Loops of the kernel that computes the input's gradient, in no order."""
    load = 2 * fetch
    return (
        "MOV R1, c[0x0][0x28]\n"
        + general_loop("bounded", load, store, COVARIANCE)
        + plain_loop("full", load, store, COVARIANCE)
        + general_loop("unbounded", load, store, UNBOUNDED + COVARIANCE)
        + plain_loop("detached", load, store)
        + END
    )


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


def test_accesses_are_counted_in_bytes():
    code = parse(assembled("f", "LDG.E.64 R2, [R2]\n LDGSTS.E.BYPASS.128 [R1], [R2]\n STG.E [R4], R2"))["f"]
    assert accessed(code, "LDG", "LDGSTS") == 24
    assert accessed(code, "STG") == 4


def test_a_branch_past_the_other_arm_of_a_condition_is_an_alternative():
    code = parse(assembled("f", plain_loop("one") + general_loop("other", FETCH, STORE)))["f"]
    assert [has_alternatives(loop) for loop in innermost_loops(code, "MUFU", "EX2")] == [False, True]
    # A loop that is left in its middle ends with a branch without a condition.
    (loop,) = parse(assembled("f", "loop: NOP\n@P0 BRA left\n NOP\n BRA loop\nleft: EXIT")).values()
    assert not has_alternatives(loop[:4])


def rows(code: str, name: str = MAP) -> dict[str, report.SassRow]:
    found = report.rows_of_kernel("sm_90", name, parse(assembled(name, code))[name], 108, 0)
    return {row.name: row for row in found}


def test_rows_of_the_input_gradient():
    found = rows(map_kernel())
    assert list(found) == ["input gradient, p detached", "input gradient"]
    assert found["input gradient, p detached"] == report.SassRow(
        "sm_90", "float32", "contiguous", "streaming", "input gradient, p detached",
        DETACHED / 4, 4.0, 0.75, 0.25, 12, 4, 108, 0,
    )  # fmt: skip
    assert found["input gradient"].instructions == DETACHED / 4 + 2


def test_of_loops_with_the_same_accesses_those_without_alternatives_are_plain():
    arms = "@P5 BRA other\n FADD R5, R5, R5\n BRA both\nother: FMUL R5, R5, R5\nboth: FADD R5, R5, R5\n"
    chooses = plain_loop("chooses", 2 * FETCH, STORE, arms)
    assert rows(map_kernel().replace(END, chooses + END)) == rows(map_kernel())


@pytest.mark.parametrize(
    ("element", "last", "dtype", "layout", "size"),
    [("N3c104HalfE", 0, "float16", "contiguous", 2), ("N3c108BFloat16E", 1, "bfloat16", "channels_last", 2)],
)
def test_narrow_elements_and_layouts(element, last, dtype, layout, size):
    code = map_kernel(FETCH.replace(".128", ".64"), STORE.replace(".128", ".64"))
    row = rows(code, kernel("map", 3, element, last))["input gradient"]
    assert (row.dtype, row.layout, row.bytes, row.elements) == (dtype, layout, 3 * size, 4)


def test_both_passes_of_a_kernel_on_chip():
    code = plain_loop("reduce", load=FETCH) + general_loop("general", "", STORE) + plain_loop("map", store=STORE) + END
    found = rows(code, kernel("resident", 1))
    assert {n: (r.path, r.instructions, r.bytes) for n, r in found.items()} == {
        "statistics": ("on chip", 26 / 4, 4),
        "normalise": ("on chip", 26 / 4, 4),
    }


def test_a_reduction_stores_nothing():
    found = rows(plain_loop("reduce", load=2 * FETCH) + END, kernel("reduce", 2))
    assert {n: (r.path, r.instructions, r.bytes) for n, r in found.items()} == {
        "backward reduction": ("streaming", 27 / 4, 8)
    }


# Of joint mode: arithmetic without exponentials, four elements to a turn.
TERMS = 32 * "FFMA R5, R5, R7, RZ\n"


def loop_without_exponentials(label: str, accesses: str, more: str = "") -> str:
    return f"{label}: NOP\n{accesses}{TERMS}{more} VIADD R0, R0, 0x1\n@!P2 BRA {label}\n"


LOAD = " LDG.E R8, desc[UR36][R4.64]\n"
ROWS_OF_CHANNEL = 4 * " LDG.E.128 R8, desc[UR36][R4.64]\n"


def test_a_reduction_of_joint_mode():
    pieces = "piece: NOP\n LDGSTS.E.BYPASS [R14+0x1f0], desc[UR36][R4.64]\n@!P2 BRA piece\n"
    code = (
        pieces  # copies the elements of a chunk that is not whole
        + loop_without_exponentials("plain", 2 * FETCH + ROWS_OF_CHANNEL)
        + END
    )
    (row,) = rows(code, joint_kernel("reduce", 2)).values()
    assert (row.name, row.path, row.bytes, row.elements) == ("joint backward reduction", "streaming", 8, 4)
    assert (row.instructions, row.memory) == ((3 + 32 + 6) / 4, 6 / 4)


@pytest.mark.parametrize(("last", "points"), [(0, 4), (1, 8)])
def test_the_backward_map_of_joint_mode(last, points):
    """Points of a thread, as many narrow loads of x and of the gradient, and one of the channel's origin."""
    loads = (2 * points + 1) * LOAD + ROWS_OF_CHANNEL
    stores = points * "@!P0 STG.E desc[UR36][R4.64], R64\n"
    code = (
        loop_without_exponentials("relu", points * LOAD + loads, TERMS)
        + loop_without_exponentials("full", loads + stores, 2 * TERMS)
        + loop_without_exponentials("weights", loads, TERMS)
        + loop_without_exponentials("fused", points * LOAD + loads + stores, TERMS)
        + loop_without_exponentials("detached", loads + stores, TERMS)
        + END
    )
    found = rows(code, joint_kernel("map_points", 3, last=last))
    assert {name: (row.path, row.bytes, row.elements) for name, row in found.items()} == {
        "joint gradient of the weights": ("streaming", 8, points),
        "joint input gradient, p detached": ("streaming", 12, points),
        "joint input gradient": ("on chip", 4, points),
    }
    assert found["joint gradient of the weights"].instructions == (3 + 64 + 2 * points + 5) / points
    assert found["joint input gradient"].instructions == (3 + 96 + 3 * points + 5) / points


@pytest.mark.parametrize(("last", "points"), [(0, 4), (1, 8)])
def test_weights_and_moments_of_joint_mode(last, points):
    broadcast = 4 * " LDS.128 R8, [R4]\n"
    exchange = f"exchange: NOP\n{8 * (LOAD + ' STS [R4], R8' + chr(10))}@!P2 BRA exchange\n"
    code = (
        loop_without_exponentials("weights", (points + 1) * LOAD + ROWS_OF_CHANNEL, TERMS)
        + ("" if last else exchange)
        + loop_without_exponentials("moments", broadcast + 4 * (LOAD if last else " LDS R8, [R4]\n"))
        + END
    )
    found = rows(code, joint_kernel("weigh", last=last))
    assert found["joint weights"].instructions == (3 + 64 + points + 5) / points
    moments = found["joint moments"]
    assert (moments.path, moments.bytes, moments.elements) == ("on chip", 0, 4)
    assert moments.instructions == (3 + 32 + 8) / 4
    assert ("joint moments, exchange" in found) == (not last)
    assert last or found["joint moments, exchange"].instructions == 18 / 8


@pytest.mark.parametrize(
    ("code", "count"),
    [
        (map_kernel(store=STORE.replace(".128", ".64")), 0),
        (map_kernel().replace("MUFU.EX2", "MUFU.LG2"), 0),
        (plain_loop("full", 2 * FETCH, STORE), 1),
        (map_kernel().replace(END, plain_loop("third", 2 * FETCH, STORE) + END), 3),
    ],
)
def test_other_loops_than_expected_are_an_error(code, count):
    message = "sm_90: expected 2 plain loops that load 8 and store 4 bytes an element "
    with pytest.raises(RuntimeError, match=message + rf"\(input gradient, p detached; .*\), found {count}"):
        rows(code)


def test_registers_are_read():
    text = f" Function {MAP}:\n  REG:108 STACK:16 SHARED:1024 LOCAL:0\n Function other:\n  REG:12 STACK:0 SHARED:0\n"
    assert report.registers([text]) == {MAP: (108, 16), "other": (12, 0)}


@pytest.fixture
def disassembler(monkeypatch):
    """A function that gives cuobjdump's place to another one: options to lines."""

    def set_up(lines):
        monkeypatch.setattr(report, "cuobjdump", lambda library, *options: iter(lines(*options)))

    return set_up


def test_report_of_every_architecture(disassembler, tmp_path):
    disassembled = []

    def lines(option, *more):
        if option == "--list-elf":
            return ["ELF file    1: _C_cuda.1.sm_80.cubin\n", "ELF file    2: _C_cuda.2.sm_90.cubin\n"]
        if option == "-res-usage":
            names = (MAP, kernel("map", 3, components=8), kernel("map", 3, "d"), "other")
            return [line for name in names for line in (f" Function {name}:\n", "  REG:108 STACK:0 SHARED:1024\n")]
        disassembled.append(more)
        return assembled(MAP, map_kernel())

    disassembler(lines)
    report.run(Path("library.so"), tmp_path)
    assert disassembled == [("-arch", "sm_80", "-fun", MAP), ("-arch", "sm_90", "-fun", MAP)]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"sass-sm-{number}{ending}" for number in (80, 90) for ending in (".csv", ".md")}
    with (tmp_path / "sass-sm-90.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["name"], first["instructions"], first["registers"]) == ("input gradient, p detached", "7.0", "108")
    assert float(second["instructions"]) == 9.0
    cells = "| contiguous float32 | streaming | input gradient | 9.0 | 53 | 4.00 | 4 | 0.75 | 0.25 | 12 | 0.27 |"
    assert cells in (tmp_path / "sass-sm-90.md").read_text()


def test_what_is_missing_is_named(disassembler, monkeypatch, tmp_path):
    disassembler(lambda *options: [])
    with pytest.raises(RuntimeError, match=r"expected machine code in library\.so, found none"):
        report.run(Path("library.so"), tmp_path)
    with pytest.raises(RuntimeError, match=r"expected kernels of 4 components for sm_90 in library\.so, found none"):
        report.rows_of(Path("library.so"), "sm_90")
    monkeypatch.setattr("cbn_ext.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"expected the CUDA library _C_cuda\*\.so in"):
        report.find_library()


def program(folder: Path, code: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cuobjdump"
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return path


def test_tools_are_found_and_their_errors_shown(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    last = tmp_path / "last"
    with pytest.raises(FileNotFoundError, match=f"expected cuobjdump in {tmp_path}/bin, {last} or on PATH; found none"):
        tools.find_tool("cuobjdump", last)
    found = program(last, "")
    assert tools.find_tool("cuobjdump", last) == str(found)
    monkeypatch.setenv("PATH", str(found.parent))
    assert tools.find_tool("cuobjdump") == str(found)
    found = program(tmp_path / "bin", 'echo "$@"; echo no such file >&2; exit 3')
    assert tools.find_tool("cuobjdump", last) == str(found)
    lines = tools.cuobjdump(Path("library.so"), "-elf")
    assert next(lines) == "-elf library.so\n"
    with pytest.raises(RuntimeError, match="cuobjdump -elf failed: no such file"):
        list(lines)


def test_counting_by_modifier():
    code = parse(assembled("f", "MUFU.EX2 R1, R1\nMUFU.RCP R1, R1\nFADD R1, R1, R1"))["f"]
    assert (
        count(code, "MUFU"),
        count(code, "MUFU", modifier="EX2"),
        count(code, "MUFU", "FADD"),
        count(code, "FMUL"),
    ) == (2, 1, 3, 0)
