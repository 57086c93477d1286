"""What csrc/cuda takes from the device: approximations that are as good as is assumed, and errors that do not stay."""

import ctypes
import os
import sysconfig

import pytest
import torch
from torch.utils import cpp_extension

from build_backend.toolkit import find_toolkit
from cbn_ext import CompoundBatchNormAct2d
from python_tests.gpu.test_execution import assert_same_bits
from python_tests.support import ROOT

EMULATION = ROOT / "python_tests" / "emulation"
TINY = torch.finfo(torch.float32).tiny
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, TINY / 2, -TINY / 2, TINY / 2**23, -torch.finfo().max]


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """The functions of probe.cu, compiled as setup.py compiles the operators."""
    with pytest.MonkeyPatch.context() as patch:
        # torch takes the folder of nvcc on PATH, which may be a wrapper script.
        patch.setattr(cpp_extension, "CUDA_HOME", str(find_toolkit(torch.version.cuda)[0].home))
        patch.setenv("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
        patch.setenv("PATH", sysconfig.get_path("scripts"), prepend=os.pathsep)  # of ninja
        library = cpp_extension.load(
            "probe",
            [str(EMULATION / "probe.cu")],
            extra_cuda_cflags=["-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"],
            extra_include_paths=[str(ROOT / "csrc"), str(EMULATION)],
            build_directory=str(tmp_path_factory.mktemp("probe")),
            is_python_module=False,
        )
    functions = ctypes.CDLL(library)
    for name in ("probe_exp2", "probe_reciprocal", "probe_refused_launch"):
        getattr(functions, name).restype = ctypes.c_char_p
    return functions


def floats(first, last):
    """About every thousandth of the floats whose bits, as an integer, are from `first` to `last`; and special ones."""
    bits = torch.arange(first, last + 1, 1009, device="cuda").int()
    return torch.cat([bits.view(torch.float32), torch.tensor(SPECIAL, device="cuda")])


def mapped(function, x):
    y = torch.empty_like(x)
    error = function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    assert error == b""
    return y


def flushed(x):
    """Zero of the same sign for what is subnormal in float32."""
    return torch.where(x.abs() < TINY, x * 0, x)


def assert_within_two_ulp(actual, exact):
    """Compare with the exact values (float64) where these are normal floats; the same special value elsewhere."""
    expected = flushed(exact.float())
    assert torch.equal(actual.isnan(), expected.isnan())
    normal = expected.isfinite() & (expected != 0)
    special = ~normal & ~expected.isnan()
    actual, expected = (t.view(torch.int32).long() for t in (actual, expected))
    assert torch.equal(actual[special], expected[special])
    assert (actual[normal] - expected[normal]).abs().max() <= 2


def test_fast_exp2(probe):
    """For all floats: of both signs, of every exponent, subnormal and without a value."""
    edges = torch.tensor([-1e30, -126.0, 128.0], device="cuda")
    below = torch.nextafter(edges, torch.full_like(edges, -torch.inf))
    x = torch.cat([floats(-(2**31), 2**31 - 1), edges, below])
    assert_within_two_ulp(mapped(probe.probe_exp2, x), torch.exp2(flushed(x).double()))


def test_fast_reciprocal(probe):
    """For sums of responsibilities, which are 1 at least, and far beyond."""
    first, last = torch.tensor([1.0, 2.0**126]).view(torch.int32).tolist()
    x = floats(first, last)
    assert_within_two_ulp(mapped(probe.probe_reciprocal, x), 1 / flushed(x).double())


def test_a_refused_launch_leaves_no_error(probe):
    """It raises, once: what is launched after it, by us or by torch, does not report it again."""
    layer = CompoundBatchNormAct2d(8, momentum=0.0, device="cuda")
    x = torch.randn(4, 8, 5, 5, device="cuda", requires_grad=True)

    def step():
        y = layer(x, x)
        return y.detach(), *torch.autograd.grad(y.sum(), [x, *layer.parameters()])

    before = step()
    assert b"CUDA error: invalid" in probe.probe_refused_launch()
    assert probe.probe_last_error() == 0
    assert torch.ones(1000, device="cuda").sum() == 1000
    after = step()
    torch.cuda.synchronize()
    assert_same_bits(after, before)
