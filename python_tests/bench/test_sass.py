"""Finding and counting the loops of kernels, on machine code small enough to count by hand."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from bench.sass import report, tools
from bench.sass.code import Instruction, accessed, count, has_alternatives, innermost_loops, is_unguarded, parse
from bench.sass.loops import counted, prologue


def kernel(name: str, number: int, element: str = "f", last: int = 0, components: int = 4, forms: int = 0) -> str:
    """A mangled name: reduce, map or resident kernel of a pass."""
    config = f"{element}Li{components}ELb{last}ENS_16ChannelPosteriorEEE"
    template = f"LNS_4PassE{number}E" + (f"LNS_5FormsE{forms}E" if name != "resident" else "")
    name = f"{name}_kernel"
    return f"_ZN3cbn{len(name)}{name}INS_6ConfigI{config}{template}EEvNS_9ArgumentsE"


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


def joint_kernel(name: str, number: int | None = None, element: str = "f", last: int = 0, components: int = 4) -> str:
    """The same of joint mode, whose passes over the channels of points have no number."""
    name = f"{name}_kernel"
    template = "" if number is None else f"LNS_4PassE{number}E"
    template += "LNS_5FormsE0E" if name == "reduce_kernel" else ""
    config = f"INS_6ConfigI{element}Li{components}ELb{last}ENS_14JointPosteriorEEE{template}EEvNS_9ArgumentsE"
    return f"_ZN3cbn{len(name)}{name}{config}"


MAP = kernel("map", 3)


def loop(label: str, accesses: str = "", more: str = "", elements: int = 4, exponentials: int = 3) -> str:
    """A loop without guards: of 2 instructions, 3 of each element, its exponentials, and those given."""
    element = exponentials * " MUFU.EX2 R1, R1\n" + " MUFU.RCP R4, R4\n" + 2 * " FFMA R5, R5, -R6.reuse, R7\n"
    return f"{label}: VIADD R0, R0, 0x1\n{elements * element}{accesses}{more}@!P2 BRA {label}\n"


def guarded(code: str) -> str:
    """The same for chunks that may not exist."""
    return code.replace(" LDG", "@P1 LDG").replace(" STG", "@P1 STG")


LOAD = " LDG.E.128 R8, desc[UR36][R4.64]\n"
STORE = " STG.E.EF.128 desc[UR36][R4.64], R64\n"
LOAD_MASK, STORE_MASK = " LDG.E.U8 R8, desc[UR36][R4.64]\n", "@!P0 STG.E.U8 desc[UR36][R4.64], R64\n"
EITHER = "@P3 BRA {0}_arm\n NOP\n BRA {0}_joins\n{0}_arm: NOP\n{0}_joins: NOP\n"
RELU = 4 * " FSETP.GT.AND P0, PT, R5, RZ, PT\n"
END = " EXIT\ntrap: BRA trap\n"


def map_kernel(load: str = LOAD, store: str = STORE) -> str:
    """Loops of the kernel that computes the input's gradient, in no order."""
    plain, fused = 2 * load + store, 2 * load + LOAD_MASK + 2 * store
    loops = [
        loop("relu", plain, RELU),
        guarded(loop("last_relu", plain, RELU)),
        loop("plain", plain),
        guarded(loop("last_plain", plain)),
        loop("unbounded_any", fused, EITHER.format("unbounded_any"), exponentials=4),
        loop("unbounded", plain, exponentials=4),
        loop("sum", fused),
        guarded(loop("last_sum", fused)),
    ]
    return "MOV R1, c[0x0][0x28]\n NOP\n" + "".join(loops) + END


PLAIN = 2 + 4 * 6 + 3  # two loads and a store


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
    assert innermost_loops(code, "MUFU") == innermost_loops(code, "MUFU", "EX2")
    assert not innermost_loops(code, "MUFU", "RCP")


def test_accesses_are_counted_in_bytes():
    code = parse(assembled("f", "LDG.E.64 R2, [R2]\n LDG.E.U16 R2, [R2]\n LDG.E.U8 R2, [R2]\n STG.E [R4], R2"))["f"]
    assert accessed(code, "LDG") == 11
    assert accessed(code, "STG") == 4
    assert accessed(code, "LDG", "STG") == 15


def test_a_guard_is_another_branch_or_a_load_with_a_condition():
    code = (
        loop("plain", LOAD)
        + loop("stores", "@P1" + STORE)
        + guarded(loop("last", LOAD))
        + loop("skips", "@P1 BRA on\non: NOP\n")
    )
    code = parse(assembled("f", code))["f"]
    assert [is_unguarded(each) for each in innermost_loops(code, "MUFU", "EX2")] == [True, True, False, False]


def test_a_branch_past_the_other_arm_of_a_condition_is_an_alternative():
    code = parse(assembled("f", loop("one", "@P1 BRA on\non: NOP\n") + loop("other", EITHER.format("other"))))["f"]
    assert [has_alternatives(each) for each in innermost_loops(code, "MUFU", "EX2")] == [False, True]
    # A loop that is left in its middle ends with a branch without a condition.
    (code,) = parse(assembled("f", "loop: NOP\n@P0 BRA left\n NOP\n BRA loop\nleft: EXIT")).values()
    assert not has_alternatives(code[:4])


def test_kernels_that_are_counted():
    assert counted("sm_90", MAP) == ("sm_90", MAP, "map", "float32", 4, 4, False, False, "3")
    name = joint_kernel("weigh", element="N3c108BFloat16E", last=1, components=8)
    assert counted("sm_90", name) == ("sm_90", name, "weigh", "bfloat16", 2, 8, True, True, None)
    others = kernel("map", 3, forms=1), kernel("map", 3, components=16), kernel("map", 3, "d"), joint_kernel("lay_out")
    assert not any(counted("sm_90", name) for name in others)


def rows(code: str, name: str = MAP) -> dict[tuple[str, str], report.SassRow]:
    found = report.rows_of_kernel(counted("sm_90", name), parse(assembled(name, code))[name], 64, 0)
    return {(row.name, row.form): row for row in found}


def test_rows_of_the_input_gradient():
    found = rows(map_kernel())
    assert found["input gradient", "plain"] == report.SassRow(
        "sm_90", 4, "float32", "contiguous", "streaming", "input gradient", "plain",
        PLAIN / 4, 4.0, 0.75, 0.0, 12, 4, 2, 64, 0,
    )  # fmt: skip
    assert {form: (row.instructions, row.mufu, row.bytes) for (_, form), row in found.items()} == {
        "plain": (PLAIN / 4, 4, 12),
        "ReLU": (PLAIN / 4 + 1, 4, 12),
        "sum and ReLU": (PLAIN / 4 + 0.5, 4, 16),
        "unbounded": (PLAIN / 4 + 1, 5, 12),
    }


def test_the_plain_form_has_the_fewest_instructions_an_element():
    """Though it takes more elements in a turn: here 8, the other 4."""
    longer = loop("plain", 4 * LOAD + 2 * STORE, elements=8)
    code = map_kernel().replace(loop("plain", 2 * LOAD + STORE), longer)
    found = rows(code)
    assert found["input gradient", "plain"].elements == 8
    assert found["input gradient", "plain"].instructions == (2 + 8 * 6 + 6) / 8
    assert found["input gradient", "ReLU"] == rows(map_kernel())["input gradient", "ReLU"]


@pytest.mark.parametrize(
    ("element", "last", "dtype", "layout", "size"),
    [("N3c104HalfE", 0, "float16", "contiguous", 2), ("N3c108BFloat16E", 1, "bfloat16", "channels_last", 2)],
)
def test_narrow_elements_and_layouts(element, last, dtype, layout, size):
    code = map_kernel(LOAD.replace(".128", ".64"), STORE.replace(".128", ".64"))
    row = rows(code, kernel("map", 3, element, last))["input gradient", "plain"]
    assert (row.dtype, row.layout, row.bytes, row.elements) == (dtype, layout, 3 * size, 4)


def test_eight_components():
    code = loop("plain", LOAD, exponentials=7) + loop("unbounded", LOAD, exponentials=8) + END
    found = rows(code, kernel("reduce", 0, components=8))
    assert {n: (r.components, r.mufu, r.elements) for n, r in found.items()} == {
        ("statistics", "plain"): (8, 8, 4),
        ("statistics", "unbounded"): (8, 9, 4),
    }


def test_normalise_reads_the_residual_and_stores_the_mask():
    code = (
        loop("plain", LOAD + STORE)
        + loop("relu", LOAD + STORE)  # as long where a conversion to 16 bits has the ReLU
        + loop("sum", 2 * LOAD + STORE + STORE_MASK, RELU)
        + loop("unbounded", LOAD + STORE, exponentials=4)
        + END
    )
    found = rows(code, kernel("map", 1))
    assert {form: (row.instructions, row.memory, row.bytes) for (_, form), row in found.items()} == {
        "plain": (28 / 4, 0.5, 8),
        "ReLU": (28 / 4, 0.5, 8),
        "sum and ReLU": (34 / 4, 1.0, 12),
        "unbounded": (32 / 4, 0.5, 8),
    }


def on_chip(*others: str) -> str:
    """Both passes on what is kept: each copies chunks ahead, or not, and has the general form too."""
    fetch = "@P4 BRA {0}_fetched\n LDGSTS.E.BYPASS.128 [R14+0x1f0], desc[UR36][R4.64]\n{0}_fetched: LDS.128 R4, [R4]\n"
    return (
        loop("first", fetch.format("first"))
        + loop("general_first", fetch.format("general_first"), exponentials=4)
        + loop("general_second", "@P1" + STORE, exponentials=4)
        + loop("relu", "@P1" + STORE, RELU)
        + loop("sum", "@P1" + STORE + STORE_MASK)
        + loop("second", " LDS.128 R4, [R4]\n@P1" + STORE)
        + "".join(others)
        + END
    )


def test_both_passes_of_a_kernel_on_chip():
    found = rows(on_chip(), kernel("resident", 1))
    assert {n: (r.path, r.instructions, r.memory, r.shared, r.bytes) for n, r in found.items()} == {
        ("statistics", "plain"): ("on chip", 29 / 4, 0.25, 0.25, 4),
        ("normalise", "plain"): ("on chip", 28 / 4, 0.25, 0.25, 4),
    }


def test_the_gradients_on_chip_share_their_first_pass():
    code = on_chip(loop("first_relu", "", RELU))
    found = {number: list(rows(code, kernel("resident", number))) for number in (3, 4)}
    assert found == {
        3: [("backward reduction", "plain"), ("input gradient", "plain")],
        4: [("input gradient, p detached", "plain")],
    }


@pytest.mark.parametrize(
    ("code", "count"),
    [
        (map_kernel(store=STORE.replace(".128", ".64")), 0),
        (map_kernel().replace("MUFU.EX2", "MUFU.LG2"), 0),
        (map_kernel().replace(loop("relu", 2 * LOAD + STORE, RELU), ""), 1),
        (map_kernel().replace(END, loop("third", 2 * LOAD + STORE) + END), 3),
    ],
)
def test_other_loops_than_expected_are_an_error(code, count):
    message = rf"{MAP}, sm_90: expected 2 loops \(input gradient, plain; input gradient, ReLU\), found {count}"
    with pytest.raises(RuntimeError, match=message):
        rows(code)


def test_other_loops_than_expected_on_chip_are_an_error():
    message = r"expected 1 loops \(statistics, plain\), found 2"
    with pytest.raises(RuntimeError, match=message):
        rows(on_chip(loop("another")), kernel("resident", 1))


def test_the_prologue_ends_where_the_first_loop_over_elements_begins():
    """Loops that prepare coefficients may compute too, in double, or a little."""
    prepares = f"NOP\nprepare: DFMA R4, R4, R6, R8\n{7 * ' FFMA R5, R5, R7, RZ' + chr(10)}@P0 BRA prepare\n"
    prepares = "NOP\nprepare: DFMA R4, R4, R6, R8\n" + 7 * " FFMA R5, R5, R7, RZ\n" + "@P0 BRA prepare\n"
    code = parse(assembled("f", prepares + loop("plain", LOAD)))["f"]
    assert prologue(code) == 10


# Of joint mode: arithmetic without exponentials, four elements to a turn.
TERMS = 32 * "FFMA R5, R5, R7, RZ\n"


def loop_without_exponentials(label: str, accesses: str, more: str = "") -> str:
    return f"{label}: NOP\n{accesses}{TERMS}{more} VIADD R0, R0, 0x1\n@!P2 BRA {label}\n"


NARROW = " LDG.E R8, desc[UR36][R4.64]\n"
ROWS_OF_CHANNEL = 4 * LOAD


@pytest.mark.parametrize(("last", "weights"), [(0, 4 * LOAD), (1, 2 * 4 * NARROW)])
def test_a_reduction_of_joint_mode(last, weights):
    """Two tensors and the four weights of each point; in channels_last two channels share them."""
    relu = loop_without_exponentials("relu", 2 * LOAD + weights, EITHER.format("relu"))
    tail = guarded(loop_without_exponentials("tail", 2 * LOAD + weights))
    copies = f"copies: NOP\n{6 * LOAD}@!P2 BRA copies\n"
    code = copies + relu + loop_without_exponentials("plain", 2 * LOAD + weights) + tail + END
    (row,) = rows(code, joint_kernel("reduce", 2, last=last)).values()
    assert (row.name, row.form, row.path) == ("joint backward reduction", "plain", "streaming")
    assert (row.bytes, row.elements) == (8, 4)
    loads = 2 + weights.count("LDG")
    assert (row.instructions, row.memory) == ((3 + 32 + loads) / 4, loads / 4)


@pytest.mark.parametrize(("last", "points"), [(0, 4), (1, 8)])
def test_the_backward_map_of_joint_mode(last, points):
    """Points of a thread, as many narrow loads of x and of the gradient, and one of the channel's origin."""
    loads = (2 * points + 1) * NARROW + ROWS_OF_CHANNEL
    stores = points * "@!P0 STG.E desc[UR36][R4.64], R64\n"
    code = (
        loop_without_exponentials("relu", points * NARROW + loads, TERMS)
        + loop_without_exponentials("full", loads + stores, 2 * TERMS)
        + loop_without_exponentials("weights", loads, TERMS)
        + loop_without_exponentials("fused", points * NARROW + loads + stores, TERMS)
        + loop_without_exponentials("detached", loads + stores, TERMS)
        + END
    )
    found = rows(code, joint_kernel("map_points", 3, last=last))
    assert {name: (row.path, row.bytes, row.elements) for (name, _), row in found.items()} == {
        "joint gradient of the weights": ("streaming", 8, points),
        "joint input gradient, p detached": ("streaming", 12, points),
        "joint input gradient": ("on chip", 4, points),
    }
    instructions = {name: row.instructions for (name, _), row in found.items()}
    assert instructions["joint gradient of the weights"] == (3 + 64 + 2 * points + 5) / points
    assert instructions["joint input gradient"] == (3 + 96 + 3 * points + 5) / points


@pytest.mark.parametrize(("last", "points", "components"), [(0, 4, 4), (1, 8, 4), (0, 2, 8)])
def test_weights_and_moments_of_joint_mode(last, points, components):
    broadcast = components * " LDS.128 R8, [R4]\n"
    exchange = f"exchange: NOP\n{8 * (NARROW + ' STS [R4], R8' + chr(10))}@!P2 BRA exchange\n"
    code = (
        loop_without_exponentials("weights", (points + 1) * NARROW + ROWS_OF_CHANNEL, TERMS)
        + ("" if last else exchange)
        + loop_without_exponentials("moments", broadcast + 4 * (NARROW if last else " LDS R8, [R4]\n"))
        + END
    )
    found = {
        name: row for (name, _), row in rows(code, joint_kernel("weigh", last=last, components=components)).items()
    }
    assert found["joint weights"].instructions == (3 + 64 + points + 5) / points
    moments = found["joint moments"]
    assert (moments.path, moments.bytes, moments.elements) == ("on chip", 0, 4)
    assert moments.instructions == (3 + 32 + components + 4) / 4
    assert ("joint moments, exchange" in found) == (not last)
    assert last or found["joint moments, exchange"].instructions == 18 / 8


def test_registers_are_read():
    text = f" Function {MAP}:\n  REG:108 STACK:16 SHARED:1024 LOCAL:0\n Function other:\n  REG:12 STACK:0 SHARED:0\n"
    assert report.registers([text]) == {MAP: (108, 16), "other": (12, 0)}


def test_targets_are_the_worst_of_the_types():
    row = replace(rows(map_kernel())["input gradient", "plain"], name="normalise", registers=64)
    found = [
        replace(row, instructions=27.5),
        replace(row, instructions=34.5, form="ReLU"),
        replace(row, instructions=99.0, form="unbounded"),
        replace(row, instructions=99.0, path="on chip", registers=99),
        replace(row, instructions=26.0, dtype="float16"),
        replace(row, instructions=27.0, dtype="bfloat16", registers=65),
        replace(row, instructions=34.5, dtype="bfloat16", form="ReLU"),
        replace(row, instructions=29.0, layout="channels_last", registers=99),
        replace(row, instructions=52.0, components=8, registers=99),
        replace(row, instructions=99.0, components=8, dtype="float16"),
    ]
    targets = {target.what: target for target in report.targets(found)}
    of_pass = {
        what: (target.value, target.limit, target.met) for what, target in targets.items() if "normalise" in what
    }
    assert of_pass == {
        "instructions, normalise, contiguous float32, M = 4": (27.5, 27, False),
        "instructions, normalise, contiguous 16-bit, M = 4": (27.0, 27, True),
        "instructions, normalise, ReLU beyond plain, contiguous, M = 4": (7.5, 7, False),
        "instructions, normalise, channels_last float32, M = 4": (29.0, 29, True),
        "instructions, normalise, channels_last 16-bit, M = 4": (None, 29, False),
        "instructions, normalise, contiguous float32, M = 8": (52.0, 52, True),
        "registers, normalise, contiguous, M = 4": (65, 64, False),
    }
    assert targets["registers, input gradient, contiguous, M = 4"].cells[-1] == "not measured"


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
            names = (MAP, kernel("map", 3, components=16), kernel("map", 3, "d"), "other")
            return [line for name in names for line in (f" Function {name}:\n", "  REG:64 STACK:0 SHARED:1024\n")]
        disassembled.append(more)
        return assembled(MAP, map_kernel())

    disassembler(lines)
    report.run(Path("library.so"), tmp_path)
    assert disassembled == [("-arch", "sm_80", "-fun", MAP), ("-arch", "sm_90", "-fun", MAP)]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"sass-sm-{number}{ending}" for number in (80, 90) for ending in (".csv", ".md")}
    with (tmp_path / "sass-sm-90.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["form"] for row in found] == ["plain", "ReLU", "sum and ReLU", "unbounded"]
    assert (found[0]["name"], found[0]["instructions"], found[0]["prologue"]) == ("input gradient", "7.25", "2")
    text = (tmp_path / "sass-sm-90.md").read_text()
    assert (
        "| contiguous float32 | streaming | input gradient | plain | 7.2 | 50 | 4.00 | 4 | 0.75 | 0.00 | 12 |" in text
    )
    assert "| contiguous float32 | streaming | input gradient | ReLU | 8.2 |  | 4.00 |  | 0.75 | 0.00 | 12 |" in text
    assert "| instructions, input gradient, contiguous float32, M = 4 | 7.25 | ≤ 57 | met |" in text
    assert "statistics 7 M; normalise 6 M - 2;" in text


def test_what_is_missing_is_named(disassembler, monkeypatch, tmp_path):
    disassembler(lambda *options: [])
    with pytest.raises(RuntimeError, match=r"expected machine code in library\.so, found none"):
        report.run(Path("library.so"), tmp_path)
    with pytest.raises(
        RuntimeError, match=r"expected kernels of \(4, 8\) components for sm_90 in library\.so, found none"
    ):
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
