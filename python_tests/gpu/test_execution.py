"""How the operators run on a GPU: streams, graphs, no synchronisation, the current device, memory, repeatability."""

import subprocess
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch

from cbn_ext import CompoundBatchNormAct2d, split_path
from python_tests.support import ROOT

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPE = (16, 24, 28, 28)


@pytest.fixture(params=LAYOUTS)
def memory_format(request):
    return LAYOUTS[request.param]


def tensors(memory_format, count=3, shape=SHAPE, dtype=torch.float32):
    return [torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format) for _ in range(count)]


def step(layer, x, residual, grad):
    """Forward with the update of the running statistics, and backward; the output and all gradients."""
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_(), *layer.parameters()]
    y = layer(leaves[0], leaves[1])
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@contextmanager
def synchronisation_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def busy(milliseconds):
    """Keep the current stream occupied at least so long: no GPU has a clock of more than 3 GHz."""
    torch.cuda._sleep(int(milliseconds * 3e6))


def test_nothing_waits_for_the_gpu(memory_format, path):
    layer = CompoundBatchNormAct2d(SHAPE[1], device="cuda")
    groups = torch.arange(SHAPE[0], device="cuda") % layer.num_components
    inputs = tensors(memory_format)

    def work():
        step(layer.train(), *inputs)
        with split_path(groups):
            step(layer, *inputs)
        step(layer.eval(), *inputs)

    work()  # loads the kernels
    with synchronisation_is_an_error():
        busy(200)  # the host needs a few for its work
        before = torch.cuda.Event()
        before.record()
        work()
        # Nor do calls that PyTorch does not know of: the host is here long before the stream.
        assert not before.query()


def test_graph_replay_equals_eager(memory_format, path):
    """A whole step is captured, with the update; each replay reads new values from the same memory."""
    eager, captured = (CompoundBatchNormAct2d(SHAPE[1], device="cuda") for _ in range(2))
    captured.load_state_dict(eager.state_dict())
    static = tensors(memory_format)
    start = {name: value.clone() for name, value in captured.state_dict().items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured, *static)
    captured.load_state_dict(start)
    for _ in range(3):
        fresh = tensors(memory_format)
        for place, values in zip(static, fresh, strict=True):
            place.copy_(values)
        graph.replay()
        assert_same_bits(results, step(eager, *fresh))
        assert_same_bits(captured.buffers(), eager.buffers())


def test_side_stream(memory_format, path):
    """Work goes to the current stream: behind what that one does, not behind what another one does."""
    layer = CompoundBatchNormAct2d(SHAPE[1], momentum=0.0, device="cuda")
    inputs = tensors(memory_format)
    late = [torch.full_like(t, torch.nan) for t in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Loads the kernels, and gives the stream memory: both may wait for the whole device.
        expected = step(layer, *inputs)
    torch.cuda.synchronize()
    finished = torch.cuda.Event()
    busy(200)  # the default stream; had anything gone there, it would not finish before
    with torch.cuda.stream(side):
        busy(20)
        for place, values in zip(late, inputs, strict=True):
            place.copy_(values)
        actual = step(layer, *late)
        finished.record()
    finished.synchronize()
    assert not torch.cuda.default_stream().query()
    torch.cuda.synchronize()
    assert_same_bits(actual, expected)


def test_two_streams_at_once(memory_format, path):
    """No memory is shared between calls."""
    layers = [CompoundBatchNormAct2d(SHAPE[1], momentum=0.0, device="cuda") for _ in range(2)]
    inputs = [tensors(memory_format) for _ in range(2)]
    expected = [step(layer, *x) for layer, x in zip(layers, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(10):
        actual = []
        for stream, layer, x in zip(streams, layers, inputs, strict=True):
            with torch.cuda.stream(stream):
                actual.append(step(layer, *x))
        torch.cuda.synchronize()
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)


def test_device_of_the_input_is_used_and_the_current_one_restored():
    """With one GPU this sees that the current device stays; with two, that the input's is the one that works."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    layer = CompoundBatchNormAct2d(SHAPE[1], device=device)
    x = torch.randn(SHAPE, device=device)
    torch.cuda.set_device(0)
    y, *grads = step(layer, x, x, x)
    assert torch.cuda.current_device() == 0
    assert {t.device for t in (y, *grads)} == {device}
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        assert_same_bits(step(layer.eval(), x, x, x), step(layer.eval(), x, x, x))


@pytest.mark.parametrize("mode", ["channel", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_a_step(memory_format, path, mode, dtype):
    """Output and gradients, one bit for each element, sums of the splits while a pass runs, and values per channel."""
    shape = (64, 64, 56, 56)
    layer = CompoundBatchNormAct2d(shape[1], device="cuda")
    x, residual, grad = tensors(memory_format, 3, shape, dtype)
    x.requires_grad_()
    residual.requires_grad_()
    groups = torch.arange(shape[0], device="cuda") % 4 if mode == "split" else None
    size, bits = x.numel() * x.element_size(), x.numel() // 8
    per_channel = 256 << 10  # statistics and their gradients: some tens of tensors of at most 3 x M x C floats, 3 KB
    workspace = 3 * size // 100 + per_channel  # the sums have at most 2.5 % of the input

    def added(function):
        """Its result, and the most bytes that the call added and those that stay.

        As they were asked for: the allocator gives blocks that may be a megabyte larger.
        """
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = function()
        after = torch.cuda.memory_stats()
        return result, *(after[f"requested_bytes.all.{which}"] - before for which in ("peak", "current"))

    def forward(*inputs):
        if mode == "channel":
            return layer(*inputs)
        with split_path(groups):
            return layer(*inputs)

    with torch.no_grad():
        forward(x, residual)
    y, peak, kept = added(lambda: forward(x))
    assert peak <= size + workspace and kept <= size + per_channel
    _, peak, _ = added(lambda: torch.autograd.grad(y, x, grad))
    assert peak <= size + workspace
    del y
    y, peak, kept = added(lambda: forward(x, residual))
    assert peak <= size + bits + workspace and kept <= size + bits + per_channel
    _, peak, _ = added(lambda: torch.autograd.grad(y, (x, residual), grad))
    assert peak <= 2 * size + workspace


@pytest.mark.parametrize(
    ("shape", "components", "dtype", "mode"),
    [
        ((128, 16, 32, 32), 4, torch.float32, "channel"),
        ((64, 64, 56, 56), 4, torch.bfloat16, "channel"),
        ((64, 256, 14, 14), 4, torch.float16, "channel"),
        ((64, 70, 7, 7), 8, torch.float64, "channel"),
        ((64, 12, 28, 28), 3, torch.float32, "split"),
        ((4096, 5, 1, 1), 4, torch.float32, "channel"),
        ((3, 2, 331, 333), 2, torch.float32, "channel"),
        ((16, 8, 56, 56), 4, torch.float32, "evaluation"),
    ],
)
def test_bitwise_repeatable(shape, components, dtype, mode, memory_format, path):
    """Sums are cut by shape and merged in order, whatever the order in which blocks run."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    layer = CompoundBatchNormAct2d(shape[1], components, momentum=0.0, device="cuda", dtype=state)
    layer.train(mode != "evaluation")
    inputs = tensors(memory_format, 3, shape, dtype)
    groups = torch.arange(shape[0], device="cuda") % components
    with split_path(groups) if mode == "split" else nullcontext():
        first, *others = (step(layer, *inputs) for _ in range(5))
    for again in others:
        assert_same_bits(again, first)


WRONG_GROUP = """
import torch
from cbn_ext import split_batch_norm
mean, var = torch.zeros(4, 3, device="cuda"), torch.ones(4, 3, device="cuda")
groups = torch.tensor([0, 1, {group}, 0], device="cuda")
split_batch_norm(torch.randn(4, 3, 5, 5, device="cuda"), groups, mean, var, None, None)
torch.cuda.synchronize()
"""


def test_group_without_a_component_is_an_error():
    """As in PyTorch's own kernels an assertion on the device, which ends the program's use of the GPU."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRONG_GROUP.format(group=group)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for group in (-1, 4)
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode != 0
        assert "device-side assert" in errors and "expected groups from 0 to M - 1" in errors
