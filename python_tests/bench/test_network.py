"""The benchmark of whole training steps: tiny ones on the CPU, its plan, and what it says where it cannot run."""

import sys

import pytest
import torch

from bench import network
from bench.network import COMPILED, EAGER, MEASURED, NETWORKS, NORMS, Network, NetworkRow
from bench.providers import BATCHNORM
from bench.report import read_csv, read_environment
from cbn_ext import CompoundBatchNorm2d, CompoundBatchNormAct2d

KIND = "float32", "channels_last"


@pytest.fixture(autouse=True)
def tiny(monkeypatch, threads):
    """A function that plans these networks for the CPU, which has this name and one thread to measure with."""
    monkeypatch.setattr(network.cpu, "cpu_model", lambda: "Some CPU")
    monkeypatch.setattr(network.cpu, "LOAD", 0.0)
    monkeypatch.setattr(network.cpu, "THREADS", 1)
    threads(1)
    return lambda *networks: monkeypatch.setitem(NETWORKS, "cpu", list(networks))


def row(model="resnet20", shape="1", norm=BATCHNORM, ratio=1.0, layout="contiguous", execution=EAGER):
    return NetworkRow(model, shape, "float32", layout, execution, norm, 10 * ratio, 9.0, 11.0, 4, ratio)


def test_each_norm_has_its_row_beside_batch_norm(tiny, threads, capsys, tmp_path):
    threads(2)
    tiny(Network("resnet20", (2, 3, 8, 8), *KIND))
    assert network.run("cpu", 0.1, tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"network-some-cpu.csv", "network-some-cpu.md"}
    rows = read_csv(tmp_path / "network-some-cpu.csv", NetworkRow)
    assert [row.norm for row in rows] == list(NORMS)
    for row in rows:
        assert row.network == ("resnet20", "2x3x8x8", *KIND, EAGER)
        assert row.samples >= 4
        assert row.ratio_to_batchnorm == pytest.approx(row.median_ms / rows[0].median_ms, abs=2e-3)
    environment = read_environment(tmp_path / "network-some-cpu.csv", NetworkRow)
    assert list(environment) == ["device", "isa", "threads", "torch", "cbn_ext", "date", "torchvision"]
    assert environment["threads"] == "1"
    assert "resnet20  2x3x8x8  float32  channels_last  eager" in capsys.readouterr().out


def test_plan_has_each_network_eager_and_compiled_on_either_device():
    wanted = {("resnet20", "128x3x32x32"), ("resnet32", "128x3x32x32"), ("resnet18", "8x3x64x64")}
    wanted |= {("resnet18", "8x3x128x128")}
    for device, more in (("cpu", set()), ("cuda", {("resnet50", "64x3x224x224"), ("resnet18", "128x3x32x32")})):
        for layout in ("contiguous", "channels_last"):
            labels = [of.labels for of in NETWORKS[device] if of.layout == layout]
            assert {of[:2] for of in labels if of[-1] == EAGER} == wanted | more
            compiled = {of[:2] for of in labels if of[-1] == COMPILED}
            assert compiled == (wanted | more if device == "cuda" else {("resnet20", "128x3x32x32")})
        # What takes longest comes last.
        executions = [of.execution for of in NETWORKS[device]]
        assert executions == sorted(executions, reverse=True)
    assert all(BATCHNORM in norms for norms in MEASURED.values())


@pytest.mark.parametrize(
    ("norm", "layers", "components", "mode"),
    [
        ("BatchNorm2d", {torch.nn.BatchNorm2d: 20}, None, None),
        ("cbn_ext M=4", {CompoundBatchNorm2d: 20}, 4, "channel"),
        # The shortcuts' have no ReLU.
        ("cbn_ext M=4 fused", {CompoundBatchNorm2d: 3, CompoundBatchNormAct2d: 17}, 4, "channel"),
        ("cbn_ext joint M=4", {CompoundBatchNorm2d: 20}, 4, "joint"),
        ("cbn_ext joint M=4 fused", {CompoundBatchNorm2d: 3, CompoundBatchNormAct2d: 17}, 4, "joint"),
        ("cbn_ext M=1", {CompoundBatchNorm2d: 20}, 1, "channel"),
        ("cbn_ext M=1 fused", {CompoundBatchNorm2d: 3, CompoundBatchNormAct2d: 17}, 1, "channel"),
    ],
)
def test_a_step_trains_the_network_with_its_norm(monkeypatch, norm, layers, components, mode):
    assert norm in NORMS
    found = []
    right = torch.optim.SGD.__init__
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **o: found.append(self) or self)
    monkeypatch.setattr(torch.optim.SGD, "__init__", lambda self, p, **o: right(self, p, **o | {"lr": 0.5}))
    step = network.training_step(Network("resnet18", (2, 3, 32, 32), "bfloat16", "contiguous"), norm, "cpu")
    norms = [module for module in found[0].modules() if "Norm" in type(module).__name__]
    kinds = [type(module) for module in norms]
    assert {kind: kinds.count(kind) for kind in layers} == layers
    assert len(norms) == 20
    assert {getattr(module, "num_components", None) for module in norms} == {components}
    assert {getattr(module, "responsibility", None) for module in norms} == {mode}
    before = {name: value.clone() for name, value in found[0].named_parameters()}
    step()
    assert all(not torch.equal(value, before[name]) for name, value in found[0].named_parameters() if "fc" in name)


@pytest.mark.parametrize(("execution", "times"), [(EAGER, 0), (COMPILED, 3)])
def test_only_compiled_networks_are_compiled(monkeypatch, execution, times):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    rows = network.measure(Network("resnet20", (2, 3, 4, 4), *KIND, execution), "cpu", 0.1)
    assert len(compiled) == times
    assert tuple(row.norm for row in rows) == MEASURED[execution]


def test_a_sample_on_a_gpu_is_the_mean_of_steps_that_were_queued(monkeypatch):
    """On the CPU instead, with a clock that only a step moves."""
    now, waits = [0], []

    def step():
        now[0] += 3_000_000

    monkeypatch.setattr(network, "training_step", lambda *_: step)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(now[0]))
    monkeypatch.setattr("time.perf_counter_ns", lambda: now[0])
    found = network.measure(Network("resnet20", (2, 3, 4, 4), *KIND), "cuda", 1.0)
    assert {row.median_ms for row in found} == {3.0}
    assert {end - begin for begin, end in zip(waits[::2], waits[1::2], strict=True)} == {5 * 3_000_000}


def test_targets_are_of_the_worst_eager_network_in_each_layout():
    fused, plain, single = "cbn_ext M=4 fused", "cbn_ext M=4", "cbn_ext M=1"
    rows = [
        row("resnet20", norm=fused, ratio=0.9),
        row("resnet32", norm=fused, ratio=1.01),
        row("resnet32", norm=fused, ratio=9.0, execution=COMPILED),
        row("resnet18", "a", norm=fused, ratio=1.15),
        row("resnet18", "b", norm=fused, ratio=1.1),
        row("resnet50", norm=fused, ratio=8.0),
        row("resnet20", norm=plain, ratio=1.1, layout="channels_last"),
        row("resnet18", "a", norm=plain, ratio=1.2, layout="channels_last"),
        row("resnet20", norm=single, ratio=0.7),
        row("resnet18", "a", norm=single, ratio=1.02),
        row("resnet50", norm=single, ratio=7.0),
    ]
    found = {target.what: target.cells[1:] for target in network.targets(rows)}
    cifar = "resnet20, resnet32"
    assert found == {
        f"{fused} / BatchNorm2d, contiguous, worst of resnet20 1, resnet32 1": ["1.01", "≤ 1", "missed"],
        f"{plain} / BatchNorm2d, contiguous, worst of {cifar}": ["", "≤ 1.1", "not measured"],
        f"{fused} / BatchNorm2d, contiguous, worst of resnet18 a, resnet18 b": ["1.15", "≤ 1.15", "met"],
        f"{plain} / BatchNorm2d, contiguous, worst of resnet18": ["", "≤ 1.15", "not measured"],
        f"{single} fused / BatchNorm2d, contiguous, worst of {cifar}, resnet18": ["", "≤ 1", "not measured"],
        f"{single} / BatchNorm2d, contiguous, worst of resnet20 1, resnet18 a": ["1.02", "≤ 1", "missed"],
        f"{fused} / BatchNorm2d, channels_last, worst of {cifar}": ["", "≤ 1", "not measured"],
        f"{plain} / BatchNorm2d, channels_last, worst of resnet20 1": ["1.10", "≤ 1.1", "met"],
        f"{fused} / BatchNorm2d, channels_last, worst of resnet18": ["", "≤ 1.15", "not measured"],
        f"{plain} / BatchNorm2d, channels_last, worst of resnet18 a": ["1.20", "≤ 1.15", "missed"],
        f"{single} fused / BatchNorm2d, channels_last, worst of {cifar}, resnet18": ["", "≤ 1", "not measured"],
        f"{single} / BatchNorm2d, channels_last, worst of {cifar}, resnet18": ["", "≤ 1", "not measured"],
    }


def test_ratios_of_a_network_stand_in_one_line():
    compiled = [
        row(norm=norm, ratio=ratio, execution=COMPILED)
        for norm, ratio in zip(MEASURED[COMPILED], (1, 2, 3), strict=True)
    ]
    table = network.ratio_table([*(row(norm=norm, ratio=i + 1.0) for i, norm in enumerate(NORMS)), *compiled])
    assert table.header[5:] == (
        *("BatchNorm2d, ms", "M=4", "joint M=4", "M=1", "M=4 fused", "joint M=4 fused", "M=1 fused"),
    )
    kind = ["resnet20", "1", "float32", "contiguous"]
    assert table.sections == [
        [
            [*kind, EAGER, "10", "2.00", "3.00", "4.00", "5.00", "6.00", "7.00"],
            [*kind, COMPILED, "10", "2.00", "", "", "3.00", "", ""],
        ]
    ]


def test_a_network_that_fails_does_not_end_the_measurement(tiny, monkeypatch, capsys, tmp_path):
    def measure(network, *others):
        if network.shape == (1,):
            raise torch.OutOfMemoryError("too big")
        return [row(*network.labels[:2])]

    monkeypatch.setattr(network, "measure", measure)
    tiny(*(Network("resnet20", shape, *KIND) for shape in ((1,), (2,))))
    assert network.run("cpu", 100.0, tmp_path) == 1
    said = "FAILED: resnet20 1 float32 channels_last eager: OutOfMemoryError: too big"
    assert said in capsys.readouterr().out
    assert f"- {said}\n" in (tmp_path / "network-some-cpu.md").read_text()
    assert read_csv(tmp_path / "network-some-cpu.csv", NetworkRow) == [row("resnet20", "2")]


def test_the_file_of_an_older_run_does_not_pass_for_this_one(tiny, monkeypatch, tmp_path):
    (tmp_path / "network-some-cpu.csv").write_text("of an older run")
    monkeypatch.setattr(network, "measure", lambda *arguments: 1 / 0)
    tiny(Network("resnet20", (1,), *KIND))
    assert network.run("cpu", 100.0, tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["network-some-cpu.md"]


def test_what_the_time_does_not_suffice_for_is_named_and_the_rest_kept(tiny, monkeypatch, capsys, tmp_path):
    now = [0.0]

    def measure(network, *others):
        now[0] += 6.0
        return [row(*network.labels[:2])]

    monkeypatch.setattr(network, "measure", measure)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tiny(*(Network("resnet20", (size,), *KIND) for size in (1, 2, 3)))
    assert network.run("cpu", 13.0, tmp_path) == 0
    said = "Left out, the time was over: resnet20 3 float32 channels_last eager"
    assert said in capsys.readouterr().out
    assert f"- {said}\n" in (tmp_path / "network-some-cpu.md").read_text()
    assert [row.shape for row in read_csv(tmp_path / "network-some-cpu.csv", NetworkRow)] == ["1", "2"]


def test_without_torchvision_its_networks_alone_are_left_out(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    tiny(Network("resnet18", (2, 3, 32, 32), *KIND), Network("resnet20", (2, 3, 4, 4), *KIND))
    assert network.run("cpu", 0.1, tmp_path) == 0
    said = "Left out, torchvision is not installed: resnet18 2x3x32x32 float32 channels_last eager"
    assert f"- {said}\n" in (tmp_path / "network-some-cpu.md").read_text()
    assert {row.model for row in read_csv(tmp_path / "network-some-cpu.csv", NetworkRow)} == {"resnet20"}


def test_a_system_that_was_not_idle_is_told(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(network, "measure", lambda network, *_: [row(*network.labels[:2])])
    tiny(Network("resnet20", (1,), *KIND))
    for load, told in ((0.2, False), (3.0, True)):
        monkeypatch.setattr(network.cpu, "LOAD", load)
        assert network.run("cpu", 100.0, tmp_path) == 0
        assert ("load average before the run was 3.0" in (tmp_path / "network-some-cpu.md").read_text()) is told


def test_without_a_gpu_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a GPU for whole training steps"):
        network.run("cuda", 1.0, tmp_path)
