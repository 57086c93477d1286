"""The benchmark of whole training steps: a tiny one on the CPU, and what it says where it cannot run."""

import sys

import pytest
import torch

from bench import network
from bench.network import NORMS, Network, NetworkRow
from bench.report import read_csv, read_environment
from cbn_ext import CompoundBatchNorm2d, CompoundBatchNormAct2d


@pytest.fixture
def tiny(monkeypatch):
    """Two images of 32 x 32, and a device of this name."""
    monkeypatch.setattr(network, "cpu_model", lambda: "Some CPU")
    monkeypatch.setitem(network.NETWORKS, "cpu", [Network("resnet18", (2, 3, 32, 32), "float32", "channels_last")])


def test_each_norm_has_its_row_beside_batch_norm(tiny, capsys, tmp_path):
    assert network.run("cpu", 0.1, tmp_path) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "network-some-cpu.csv"
    rows = read_csv(path, NetworkRow)
    assert [row.norm for row in rows] == list(NORMS)
    assert {(r.model, r.shape, r.dtype, r.layout) for r in rows} == {
        ("resnet18", "2x3x32x32", "float32", "channels_last")
    }
    for row in rows:
        assert row.samples >= 4
        assert row.ratio_to_batchnorm == pytest.approx(row.median_ms / rows[0].median_ms, abs=2e-3)
    environment = read_environment(path, NetworkRow)
    assert list(environment) == ["device", "torch", "torchvision", "cbn_ext", "date"]
    assert environment["torch"] == torch.__version__
    assert "resnet18  2x3x32x32  float32  channels_last  cbn_ext fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("norm", "layers"),
    [
        (NORMS[0], {torch.nn.BatchNorm2d: 20}),
        (NORMS[1], {CompoundBatchNorm2d: 20}),
        (NORMS[2], {CompoundBatchNorm2d: 3, CompoundBatchNormAct2d: 17}),  # the shortcuts' have no ReLU
    ],
)
def test_a_step_trains_the_network_with_its_norm(monkeypatch, norm, layers):
    found = []
    right = torch.optim.SGD.__init__
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **o: found.append(self) or self)
    monkeypatch.setattr(torch.optim.SGD, "__init__", lambda self, p, **o: right(self, p, **o | {"lr": 0.5}))
    step = network.training_step(Network("resnet18", (2, 3, 32, 32), "bfloat16", "contiguous"), norm, "cpu")
    kinds = [type(module) for module in found[0].modules()]
    assert {kind: kinds.count(kind) for kind in layers} == layers
    assert sum("Norm" in kind.__name__ for kind in kinds) == 20
    before = {name: value.clone() for name, value in found[0].named_parameters()}
    step()
    assert all(not torch.equal(value, before[name]) for name, value in found[0].named_parameters() if "fc" in name)


def test_a_network_that_fails_does_not_end_the_measurement(tiny, monkeypatch, capsys, tmp_path):
    row = NetworkRow("b", "1", "float32", "contiguous", NORMS[0], 1.0, 1.0, 1.0, 4, 1.0)

    def measure(network, *others):
        if network.model == "a":
            raise torch.OutOfMemoryError("too big")
        return [row]

    monkeypatch.setattr(network, "measure", measure)
    monkeypatch.setitem(
        network.NETWORKS, "cpu", [Network(name, (1, 3, 8, 8), "float32", "contiguous") for name in "ab"]
    )
    assert network.run("cpu", 100.0, tmp_path) == 1
    assert "FAILED: a 1x3x8x8 float32 contiguous: OutOfMemoryError: too big" in capsys.readouterr().out
    assert read_csv(tmp_path / "network-some-cpu.csv", NetworkRow) == [row]


def test_the_file_of_an_older_run_does_not_pass_for_this_one(tiny, monkeypatch, tmp_path):
    (tmp_path / "network-some-cpu.csv").write_text("of an older run")
    monkeypatch.setattr(network, "measure", lambda *arguments: 1 / 0)
    assert network.run("cpu", 100.0, tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_the_time_does_not_suffice_for_is_named_and_the_rest_kept(tiny, monkeypatch, capsys, tmp_path):
    now = [0.0]

    def measure(network, *others):
        now[0] += 6.0
        return [NetworkRow(network.model, "1", "float32", "contiguous", NORMS[0], 1.0, 1.0, 1.0, 4, 1.0)]

    monkeypatch.setattr(network, "measure", measure)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setitem(
        network.NETWORKS, "cpu", [Network(name, (1, 3, 8, 8), "float32", "contiguous") for name in "abc"]
    )
    assert network.run("cpu", 13.0, tmp_path) == 0
    assert "Left out, the time was over: c 1x3x8x8 float32 contiguous" in capsys.readouterr().out
    assert [row.model for row in read_csv(tmp_path / "network-some-cpu.csv", NetworkRow)] == ["a", "b"]


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a GPU for whole training steps"):
        network.run("cuda", 1.0, tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit, match="expected torchvision"):
        network.run("cpu", 1.0, tmp_path)
