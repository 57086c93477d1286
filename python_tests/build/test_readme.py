"""The README's Python runs as it stands, and does what the text around it says."""

import re

import torch
from torch import nn

from cbn_ext import CompoundBatchNorm2d, CompoundBatchNormAct2d
from python_tests.support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONVERSION, FUSION, LOOP = re.findall(r"```python\n(.*?)```", README, re.S)


def test_conversion():
    names: dict = {}
    exec(CONVERSION, names)
    kinds = [type(module) for module in names["model"].modules()]
    assert kinds.count(CompoundBatchNorm2d) == 20 and nn.BatchNorm2d not in kinds


def test_fusion(capsys):
    names: dict = {}
    exec(CONVERSION, names)
    exec(FUSION, names)
    kinds = [type(module) for module in names["model"].modules()]
    assert CompoundBatchNormAct2d in kinds and nn.BatchNorm2d not in kinds and nn.ReLU not in kinds
    # What the comment says is printed.
    assert re.search(r"# (.*)", FUSION)[1] in capsys.readouterr().out.splitlines()


def test_loop_with_both_paths():
    """The loop trains: the loss on the images it sees falls, and every component of the layer moves."""
    torch.manual_seed(0)
    norm = CompoundBatchNorm2d(8, affine_init="unit")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    start = norm.running_mean.clone()
    class_counts = [8, 6, 4, 3, 2, 1]
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor(class_counts))
    images = torch.randn(6, 3, 1, 1)[labels] + 0.1 * torch.randn(len(labels), 3, 6, 6)
    names = {
        "model": model,
        "class_counts": class_counts,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "loader": [(images, images, labels)],
    }
    losses = []
    for _ in range(30):
        exec(LOOP, names)
        losses.append(names["loss"].item())
    assert losses[-1] < losses[0] - 1
    assert ((norm.running_mean - start).abs().amax(1) > 0.01).all()
