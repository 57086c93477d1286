"""What convert_compound_batchnorm(fuse=True) returns is used like the model it came from."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cbn_ext import (
    CompoundBatchNorm1d,
    CompoundBatchNorm2d,
    CompoundBatchNormAct1d,
    CompoundBatchNormAct2d,
    CompoundBatchNormAct3d,
    convert_compound_batchnorm,
    split_path,
)
from cbn_ext.fuse import Fusion


class Block(nn.Module):
    """relu(norm(conv(x − offset)) + x)"""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("offset", torch.rand(3, 1, 1), persistent=False)

    def forward(self, x):
        out = self.norm(self.conv(x - self.offset))
        out += x
        return self.relu(out)


class Head(nn.Module):
    """Nothing here to fuse, and more than a graph could hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            scale = 1 if x.sum() > 0 else 2
        return F.dropout(self.linear(x.mean((2, 3))), 0.5, self.training) * scale


class Model(nn.Module):
    """Blocks in a container, one of them twice, parts that forward does not use, and a head."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.alone = nn.Parameter(torch.rand(3))
        block = Block()
        self.blocks = nn.ModuleList([block, block, Block()])
        self.branches = nn.ModuleDict({"a": Block()})
        self.head = Head()
        self.stages = nn.Sequential(Block(), Block())

    def forward(self, x):
        x = self.stages(self.branches["a"](self.blocks[2](self.blocks[0](x))))
        x *= 2
        return self.head(x)


@pytest.fixture
def x():
    return torch.randn(6, 3, 5, 4)


def converted(model, **options):
    """The same start of the random means every time."""
    torch.manual_seed(1)
    return convert_compound_batchnorm(model, **options)


def test_state_is_that_of_the_plain_conversion(x):
    """All keys in their order, also of what forward does not use; each loads the other's, and a BatchNorm's."""
    model = Model()
    batchnorm = copy.deepcopy(model.state_dict())
    fused = converted(model, fuse=True)
    plain = converted(copy.deepcopy(model))
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert list(fused.state_dict()) == list(copy.deepcopy(fused).state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in fused.named_buffers()] == [name for name, _ in plain.named_buffers()]
    fused.train()(x)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain.eval()(x), fused.eval()(x))
    fused.load_state_dict(plain.state_dict())
    fused.load_state_dict(batchnorm)
    torch.testing.assert_close(fused(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_names_lead_to_the_layers():
    fused = converted(Model(), fuse=True)
    assert isinstance(fused, torch.fx.GraphModule) and type(fused).__name__ == "Model"
    assert type(fused.stages[1].norm) is CompoundBatchNormAct2d and type(fused.stages[-1].relu) is nn.Identity
    assert fused.blocks[0].norm is fused.blocks[1].norm is not fused.blocks[2].norm
    assert type(fused.branches["a"].norm) is CompoundBatchNormAct2d
    assert type(fused.unused[1]) is CompoundBatchNorm2d
    with pytest.raises(NotImplementedError):
        fused.stages[1](torch.ones(2, 3, 5, 4))


def test_what_holds_no_norm_stays_as_it_is(x):
    """With its control flow, its modes and its attributes."""
    model = Model()
    fused = converted(model, fuse=True)
    assert fused.head is model.head and fused.stages[0].conv is model.stages[0].conv
    fused.train()
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x)) and fused.head.calls == 4


def test_the_model_given_stays_as_it_is(x):
    model = Model()
    model.stages[1].eval()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    modes = [module.training for module in modules]
    fused = converted(model, fuse=True)
    fused(x)
    assert list(model.modules()) == modules and [module.training for module in modules] == modes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert fused.training and fused.stages[0].training and fused.stages[0].norm.training
    assert not fused.stages[1].training and not fused.stages[1].norm.training


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(duplicate, x):
    """They are models of their own, with everything that the model has."""
    fused = converted(Model(), fuse=True).eval()
    other = duplicate(fused)
    assert list(other.state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(other(x), fused(x), rtol=0, atol=0)
    expected = fused(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.train()(x)
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=0)


def test_report_and_log(caplog):
    """For each norm in the order of their names; a copy has the report too."""
    with caplog.at_level(logging.INFO, "cbn_ext"):
        fused = converted(Model(), fuse=True)
    fusions = fused.meta["fusions"]
    assert fusions[0] == Fusion("unused.1", reason="torch.fx sees no call of it")
    assert fusions[1:] == tuple(
        Fusion(f"{name}.norm", residual=True) for name in ("blocks.0", "blocks.2", "branches.a", "stages.0", "stages.1")
    )
    assert copy.deepcopy(fused).meta["fusions"] == fusions
    assert caplog.messages == ["5 of 6 batch normalizations fused", *map(str, fusions)]
    assert "unused.1: not fused, torch.fx sees no call of it" in caplog.messages
    assert "stages.1.norm: fused with the sum and the ReLU" in caplog.messages


@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (nn.BatchNorm1d, CompoundBatchNormAct1d, (8, 3)),
        (nn.BatchNorm1d, CompoundBatchNormAct1d, (8, 3, 5)),
        (nn.BatchNorm3d, CompoundBatchNormAct3d, (4, 3, 2, 4, 5)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"responsibility": "joint", "affine_init": "unit"}], ids=["channel", "joint"])
def test_other_dimensions_and_options(norm, layer, shape, options):
    model = nn.Sequential(norm(3, affine=False), nn.ReLU(), norm(3, track_running_stats=False), nn.ReLU())
    fused = converted(model, num_components=3, fuse=True, **options)
    assert type(fused.get_submodule("0")) is type(fused.get_submodule("2")) is layer
    x = torch.randn(shape)
    torch.testing.assert_close(fused(x), converted(copy.deepcopy(model), num_components=3, **options)(x))
    assert all(getattr(fused.get_submodule("0"), name) == value for name, value in options.items())


def test_split_path(x):
    """Reaches the fused layers."""
    model = nn.Sequential(Block(), Block())
    groups = torch.tensor([0, 1, 2, 3, 0, 1])
    fused = converted(model, fuse=True, affine_init="unit")
    plain = converted(copy.deepcopy(model), affine_init="unit")
    with split_path(groups):
        split = fused(x)
        torch.testing.assert_close(split, plain(x))
    assert (split - fused(x)).abs().max() > 1e-2
    torch.testing.assert_close(fused.state_dict()["0.norm.running_var"][:, 0].unique().numel(), 4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(training, x):
    fused = converted(nn.Sequential(Block(), Block()), fuse=True).train(training)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused(x))
    for network in (compiled, fused):
        network(x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_autocast(x):
    """The convolutions' type is that of the fused layers' outputs, as it is of batch normalization's."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Block())
    fused, plain = converted(model, fuse=True), converted(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(("body", "what"), [(lambda x: x.mean((2, 3), keepdim=True), "shape"), (torch.sin, "dtype")])
def test_residual_that_does_not_fit_raises(body, what, x):
    """Which cannot be known before."""

    class Added(Block):
        def forward(self, x):
            return F.relu(self.norm(x) + body(x.double() if what == "dtype" else x))

    fused = converted(Added(), fuse=True)
    with pytest.raises(RuntimeError, match=f"residual.*{what}"):
        fused(x)


def test_arguments_with_a_default_keep_it(x):
    """By position and by name; another value is an error, not another result."""

    class Options(Block):
        def forward(self, x, mask=None, *, scale=2.0, features=False):
            out = super().forward(x)
            if mask is not None:
                out = out * mask
            return (out, x) if features else out * scale

    model = Options()
    fused = converted(model, fuse=True)
    plain = converted(model)
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(fused(x=x, mask=None, scale=2.0, features=False), plain(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(fused.eval()))(x, mask=None), plain.eval()(x))
    for option in ({"mask": x}, {"scale": 3.0}, {"features": True}):
        with pytest.raises(AssertionError, match=f"{next(iter(option))} is .* in the fused model"):
            fused(x, **option)


def test_structured_arguments_and_results(x):
    class Structured(Block):
        def forward(self, inputs, *rest):
            return {"sum": super().forward(inputs["x"]) + rest[0], "list": [rest[1]]}

    fused = converted(Structured(), fuse=True)
    out = fused({"x": x}, 1.0, "label")
    assert fused.meta["fusions"][0].residual and out["list"] == ["label"] and (out["sum"] >= 1).all()


class Hooks:
    """Counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, *_):
        self.calls.append(type(module))


def test_hooks_are_kept(x):
    """The norm's and the ReLU's, which are not fused then; and what is not replaced keeps its own anyway."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    hooks = Hooks()
    handles = [model[0].register_forward_hook(hooks), model[1].register_forward_pre_hook(hooks)]
    handles += [model[4].register_forward_hook(hooks)]
    fused = converted(model, fuse=True)
    assert [fusion.reason for fusion in fused.meta["fusions"]] == [
        "it has hooks, which are to see its own output",
        "the ReLU '4' has hooks",
    ]
    fused(x)
    assert hooks.calls == [nn.Conv2d, CompoundBatchNorm2d, nn.ReLU]
    for handle in handles:
        handle.remove()
    fused(x)
    assert len(hooks.calls) == 3


def test_norm_inside_of_a_module_of_torch():
    """torch.fx does not look into it: converted there, in a copy, and not fused."""
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), nn.ReLU()).eval()
    model[0].norm1 = nn.BatchNorm1d(5).eval()
    x = torch.randn(3, 5, 4)
    fused = converted(model, fuse=True)
    assert [str(fusion) for fusion in fused.meta["fusions"]] == ["0.norm1: not fused, torch.fx sees no call of it"]
    layer = fused.get_submodule("0")
    assert type(layer.norm1) is CompoundBatchNorm1d and type(model[0].norm1) is nn.BatchNorm1d
    assert layer.linear1.weight is model[0].linear1.weight
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
