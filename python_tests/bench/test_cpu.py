"""The benchmark on the CPU: its comparisons, targets and files, and the command; no time is judged here."""

import csv
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import cpu
from bench.__main__ import RESULTS, main
from bench.cases import Case, WrongResultError
from bench.harness import BOTH, DIRECTIONS, FORWARD, MemoryRow, Summary, TimeRow
from bench.providers import BATCHNORM, COMPILED, JOINT, OURS, REFERENCE, SPLIT, Comparison
from bench.report import Table, Target, read_csv, read_environment, write_csv

ENVIRONMENT = {
    "device": "Some CPU (R) 9 @ 2.0GHz", "isa": "AVX2", "threads": 2,
    "torch": "2.11.0", "cbn_ext": "0.1.0", "date": "2026-01-31",
}  # fmt: skip


def time_row(**changes) -> TimeRow:
    row = TimeRow(OURS, "2x3x4x4", "float32", "contiguous", 4, "mixed", BOTH, 20.0, 18.0, 25.0, 7, 1.5, 2.0)
    return replace(row, **changes)


def memory_row(**changes) -> MemoryRow:
    return replace(MemoryRow(OURS, "2x3x4x4", "float32", "contiguous", 4, "mixed", 1000, 100, None), **changes)


def test_csv_has_one_column_for_each_field_and_the_environment_in_every_row(tmp_path):
    path = tmp_path / "times.csv"
    write_csv(path, [time_row(median_us=1.23456), time_row(provider=BATCHNORM, M=1)], ENVIRONMENT)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    case, machine = "provider shape dtype layout M data direction", "device isa threads torch cbn_ext date"
    times = "median_us p20_us p80_us samples gb_per_s ratio_to_batchnorm"
    assert list(rows[0]) == f"{case} {times} {machine}".split()
    assert rows[0]["median_us"] == "1.235"
    assert [row["provider"] for row in rows] == [OURS, BATCHNORM]
    assert {row["device"] for row in rows} == {ENVIRONMENT["device"]}


def test_csv_leaves_what_was_not_measured_empty(tmp_path):
    path = tmp_path / "memory.csv"
    write_csv(path, [memory_row()], ENVIRONMENT)
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["beyond"], row["resident"]) == ("100", "")


def test_rows_and_environment_come_back_from_a_csv(tmp_path):
    path = tmp_path / "memory.csv"
    rows = [memory_row(resident=None), memory_row(resident=0, shape="9x9")]
    write_csv(path, rows, ENVIRONMENT)
    assert read_csv(path, MemoryRow) == rows
    assert read_environment(path, MemoryRow) == {name: str(value) for name, value in ENVIRONMENT.items()}
    times = [time_row(median_us=1.5, ratio_to_batchnorm=None)]
    write_csv(path, times, ENVIRONMENT)
    assert read_csv(path, TimeRow) == times


def test_a_csv_that_could_not_be_finished_leaves_the_one_before(tmp_path):
    path = tmp_path / "memory.csv"
    write_csv(path, [memory_row()], ENVIRONMENT)
    with pytest.raises(TypeError):
        write_csv(path, [memory_row(beyond=7), None], ENVIRONMENT)
    assert read_csv(path, MemoryRow) == [memory_row()]


SMALL = Case((4, 6, 5, 5))


def test_nothing_is_timed_after_a_wrong_result(monkeypatch):
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    timed = []
    monkeypatch.setattr(nn, "BatchNorm2d", Shifted)
    monkeypatch.setattr("bench.cpu.time_interleaved", timed.append)
    with pytest.raises(WrongResultError, match="BatchNorm2d"):
        cpu.compare(Comparison(SMALL, ((BATCHNORM, 1),)))
    assert not timed


def test_a_comparison_needs_the_batch_norm_it_relates_to():
    with pytest.raises(ValueError, match="expected BatchNorm2d among the members"):
        Comparison(SMALL, ((OURS, 4),))


def test_comparison_gives_a_row_for_each_member_and_direction(monkeypatch):
    def three_steps(workloads):
        microseconds = {OURS: 30.0, BATCHNORM: 10.0, OURS + SPLIT: 5.0}
        return {key: {d: Summary(microseconds[key[0]], 9.0, 40.0, 3) for d in DIRECTIONS} for key in workloads}

    monkeypatch.setattr("bench.cpu.time_interleaved", three_steps)
    members = ((OURS, 4), (BATCHNORM, 1), (OURS + SPLIT, 4))
    times, memory = cpu.compare(Comparison(SMALL, members))
    assert [(row.provider, row.M, row.direction) for row in times] == [
        (provider, m, d) for provider, m in members for d in DIRECTIONS
    ]
    assert {row.ratio_to_batchnorm for row in times if row.provider == OURS} == {3.0}
    assert {row.ratio_to_batchnorm for row in times if row.provider == OURS + SPLIT} == {0.5}
    tensor_bytes = 4 * 6 * 5 * 5 * 4
    assert times[0].gb_per_s == pytest.approx(2 * tensor_bytes / 30e3)
    assert [row.in_out for row in memory] == [4 * tensor_bytes] * 3
    # Statistics and gradients of the parameters at least; no more than one tensor like the input beside them.
    assert 4 * 6 * 4 <= memory[1].beyond < 1.5 * tensor_bytes


def test_targets_take_geometric_means_over_shapes_of_mixed_forward_and_backward():
    members = {(OURS, 4): 4.0, (OURS, 1): 2.0, (BATCHNORM, 1): 2.0}
    members |= {(REFERENCE, 4): 40.0, (REFERENCE + COMPILED, 4): 36.0, (OURS + JOINT, 4): 5.0}
    times, memory = [], []
    for shape, factor in (("a", 1.0), ("b", 4.0)):
        for layout in ("contiguous", "channels_last"):
            for (provider, m), median in members.items():
                # On shape b ours with M=4 is four times slower against the others.
                slower = factor if (provider, m) == (OURS, 4) else 1.0
                row = time_row(provider=provider, M=m, shape=shape, layout=layout, median_us=median * slower)
                times += [
                    row,
                    replace(row, data="constant", median_us=1e9),
                    replace(row, direction=FORWARD, median_us=7.0),
                ]
    for shape, resident in (("a", None), ("b", 500)):
        memory.append(memory_row(shape=shape, beyond=150, resident=resident))
        memory.append(memory_row(provider=BATCHNORM, M=1, shape=shape, beyond=100, resident=resident and 0))
    values = {target.what: (target.value, target.met) for target in cpu.targets(times, memory)}
    memory_what = "peak memory, cbn_ext M=4 / BatchNorm2d, worst shape and layout: "
    assert values == {
        "time, cbn_ext M=4 / BatchNorm2d, contiguous": (pytest.approx(4.0), False),
        "time, cbn_ext M=4 / BatchNorm2d, channels_last": (pytest.approx(4.0), False),
        "time, cbn_ext M=1 / BatchNorm2d, contiguous": (pytest.approx(1.0), True),
        "time, cbn_ext M=1 / BatchNorm2d, channels_last": (pytest.approx(1.0), True),
        "time, cbn_ext joint M=4 / BatchNorm2d, contiguous": (pytest.approx(2.5), False),
        "time, cbn_ext joint M=4 / BatchNorm2d, channels_last": (pytest.approx(2.5), True),
        "time, reference / cbn_ext, M=4": (pytest.approx(5.0), False),
        "time, reference compiled / cbn_ext, M=4": (pytest.approx(4.5), False),
        memory_what + "allocated beyond input and output": (pytest.approx(1.5), False),
        memory_what + "allocated in all": (pytest.approx(1150 / 1100), True),
        memory_what + "resident in all": (pytest.approx(1.5), False),
    }


@pytest.mark.parametrize(
    ("value", "relation", "met"), [(3.0, "≤", True), (3.1, "≤", False), (3.0, "≥", True), (2.9, "≥", False)]
)
def test_a_target_is_met_at_its_limit(value, relation, met):
    assert Target("something", value, relation, 3.0).met is met


def test_report_writes_files_named_after_the_machine(tmp_path):
    members = ((OURS, 4), (BATCHNORM, 1), (OURS, 1), (OURS + JOINT, 4), (REFERENCE, 4), (REFERENCE + COMPILED, 4))
    times = [
        time_row(provider=provider, M=m, layout=layout, direction=direction)
        for layout in ("contiguous", "channels_last")
        for provider, m in members
        for direction in DIRECTIONS
    ]
    memory = [memory_row(resident=None), memory_row(provider=BATCHNORM, M=1)]
    cpu.make_report(ENVIRONMENT, 0.7, times, memory).write(tmp_path / "results")
    name = "cpu-some-cpu-r-9-2-0ghz"
    written = {path.name: path for path in (tmp_path / "results").iterdir()}
    assert set(written) == {name + ending for ending in (".csv", "-memory.csv", ".md", ".png")}
    summary = written[name + ".md"].read_text()
    assert "Some CPU (R) 9 @ 2.0GHz, AVX2, 2 threads; torch 2.11.0, cbn_ext 0.1.0; 2026-01-31; load" in summary
    assert "- The load average before the run was 0.7: other processes disturb these times." in summary
    assert "| time, reference / cbn_ext, M=4 | 1.00 | ≥ 15 | missed |" in summary
    cells = ["2x3x4x4 float32 channels_last", BATCHNORM, "1", *["20 (18-25)"] * 3, "1.50", "2.00"]
    assert f"| {' | '.join(cells)} |" in summary
    assert f"]({name}.png)" in summary
    assert written[name + ".png"].read_bytes().startswith(b"\x89PNG")


def test_a_target_that_was_not_measured_says_so():
    target = Target("speed", None, "≤", 3.0)
    assert target.cells == ["speed", "", "≤ 3", "not measured"]
    assert not target.met


@pytest.mark.parametrize(
    ("command", "part", "arguments"),
    [
        ("cuda --seconds 90", "cuda.report", (90.0, RESULTS, False)),
        ("cuda --sweep", "cuda.report", (600, RESULTS, True)),
        ("network --device cpu --seconds 5", "network", ("cpu", 5.0, RESULTS)),
        ("sass", "sass.report", (None, RESULTS)),
        ("cpu", "cpu", (RESULTS,)),
    ],
)
def test_a_command_runs_its_part_alone(monkeypatch, command, part, arguments):
    called = []
    for name in ("cpu", "cuda.report", "network", "sass.report"):
        monkeypatch.setattr(f"bench.{name}.run", lambda *given, name=name: called.append((name, given)))
    monkeypatch.setattr("sys.argv", ["bench", *command.split()])
    with pytest.raises(SystemExit) if part in ("cuda.report", "network") else nullcontext():
        main()
    assert called == [(part, arguments)]


@pytest.mark.parametrize(("gpu", "status"), [(False, 0), (False, 1), (True, 0), (True, 1)])
def test_a_command_without_a_part_runs_layers_and_networks_on_what_is_there(monkeypatch, gpu, status):
    """status: that of the networks on the CPU, which does not end the run."""
    called = []

    def run_network(device, seconds, folder):
        called.append(f"network on {device}")
        return status * (device == "cpu")

    monkeypatch.setattr("bench.cpu.run", lambda folder: called.append("cpu"))
    monkeypatch.setattr("bench.cuda.report.run", lambda *_: called.append("cuda") or 0)
    monkeypatch.setattr("bench.network.run", run_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("sys.argv", ["bench"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    assert called == ["cpu", "network on cpu"] + ["cuda", "network on cuda"] * gpu


def test_environment_tells_the_machine():
    environment = cpu.environment()
    assert environment["device"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()


def test_tables_are_aligned_on_the_terminal():
    table = Table("Two", ("what", "n"), [[("a", "1")], [("longer", "20")]])
    assert table.text() == "Two\n---\nwhat    n\na       1\nlonger  20"
