"""Loading the libraries, choosing a backend, and what build_info tells."""

import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cbn_ext
from cbn_ext import _extension, _host, use_backend

# What a user sees whose libraries do not load: one warning at import, a layer that works, an error on demand.
PROGRAM = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import cbn_ext
    from cbn_ext import _extension
    x = torch.randn(8, 3, 2, 2)
    difference = cbn_ext.CompoundBatchNorm2d(3, num_components=1)(x) - torch.nn.BatchNorm2d(3)(x)
print([str(warning.message) for warning in caught if "cbn_ext" in str(warning.message)])
print(_extension.load_error() is None, cbn_ext.build_info()["backends"], cbn_ext.build_info()["load_error"])
print(difference.abs().max().item() < 1e-5)
try:
    cbn_ext.use_backend("native")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("library", "error"),
    [
        ("garbage", r"OSError: .*_C\.abi3\.so: file too short"),
        (None, r"not built: there is no _C library in \S+"),
    ],
    ids=["broken", "missing"],
)
def test_import_without_library_warns_once_and_falls_back(tmp_path, library, error):
    package = tmp_path / "cbn_ext"
    package.mkdir()
    for source in Path(cbn_ext.__file__).parent.glob("*.py"):
        shutil.copy(source, package)
    if library:
        (package / "_C.abi3.so").write_text(library)
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=True)
    warned, available, works, refused = run.stdout.splitlines()
    assert re.fullmatch(
        rf"\['cbn_ext: no native libraries, the slower PyTorch reference is used instead: {error}'\]", warned
    )
    assert re.fullmatch(rf"False \['reference'\] {error}", available)
    assert works == "True"
    assert re.fullmatch(rf"the native backend is not available: {error}", refused)


LOADS = """
import torch
torch.version.cuda = {version}
from cbn_ext import build_info, _extension
print(_extension.load_error() is None, _extension.load_error("cuda") is None, torch.cuda.is_initialized())
print(build_info()["cuda_load_error"])
"""


@pytest.mark.parametrize(
    ("version", "library", "error"),
    [
        (None, "garbage", rf"torch {re.escape(torch.__version__)} has no CUDA"),
        ("13.0", "garbage", r"OSError: .*_C_cuda\.abi3\.so: file too short"),
        ("13.0", None, r"not built: there is no _C_cuda library in \S+"),
    ],
    ids=["cpu_torch", "broken", "missing"],
)
def test_cuda_library_that_does_not_load_leaves_the_cpu_operators(tmp_path, version, library, error):
    package = tmp_path / "cbn_ext"
    folder = Path(cbn_ext.__file__).parent
    package.mkdir()
    for source in [*folder.glob("*.py"), *folder.glob("_C.*"), *folder.glob("_host.*")]:
        shutil.copy(source, package)
    if library:
        (package / "_C_cuda.abi3.so").write_text(library)
    program = [sys.executable, "-W", "error", "-c", LOADS.format(version=repr(version))]
    run = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    available, reason = run.stdout.splitlines()
    assert available == "True False False"
    assert re.fullmatch(error, reason)


def test_device_without_operators():
    assert _extension.load_error("xpu") == "there are none for xpu"


def test_fallback_on_a_device_warns_once(monkeypatch):
    """As on a GPU whose operators were not built; also while torch.compile traces."""
    monkeypatch.setattr(_extension, "_warned_devices", set())
    monkeypatch.setitem(_extension._load_errors, "cpu", "not built: no nvcc")
    layer, x = cbn_ext.CompoundBatchNorm2d(3).eval(), torch.randn(8, 3, 2, 2)
    with pytest.warns(RuntimeWarning, match="no native operators for cpu, .* is used instead: not built: no nvcc"):
        y = torch.compile(layer, fullgraph=True, backend="eager")(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(x), y)
    with pytest.raises(RuntimeError, match="not available: not built: no nvcc"):
        use_backend("native")


def test_build_info():
    info = cbn_ext.build_info()
    names = "version torch torch_built backends isa compiler cuda_archs resolved load_error cuda_load_error"
    assert list(info) == names.split()
    assert info["version"] == cbn_ext.__version__ == "0.1.0"
    assert info["torch"] == torch.__version__
    assert info["backends"] == ["native", "reference"]
    assert info["load_error"] is None
    assert info["isa"] in {"avx512", "avx2", "baseline"}
    assert info["isa"] == _host.cpu_capability()
    assert re.match(r"(gcc|clang) \d+\.\d+", info["compiler"])
    assert info["resolved"].startswith(f"cbn_ext: torch {info['torch_built']} in ")
    assert (" CPU only: " in info["resolved"]) == (info["cuda_archs"] == [])
    # The operators are registered wherever they were built, also without a GPU.
    assert (info["cuda_load_error"] is None) == (info["cuda_archs"] != [])


def test_build_info_is_printed(capsys):
    runpy.run_module("cbn_ext", run_name="__main__")
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert printed["version"] == "0.1.0"
    assert printed["backends"] == "native, reference"
    assert printed["resolved"] == cbn_ext.build_info()["resolved"]
    assert printed["load_error"] == "None"


def test_use_backend_nests_and_restores():
    assert _extension.backend() == "auto"
    with use_backend("reference"):
        assert _extension.backend() == "reference"
        with use_backend("native"):
            assert _extension.backend() == "native"
        assert _extension.backend() == "reference"
    assert _extension.backend() == "auto"


def test_use_backend_restores_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert _extension.backend() == "auto"


def test_use_backend_as_a_function_stays():
    use_backend("reference")
    assert _extension.backend() == "reference"
    use_backend("auto")
    assert _extension.backend() == "auto"


def test_use_backend_names_what_it_expected():
    message = "expected one of 'auto', 'native', 'reference' as backend, got 'cuda'"
    with pytest.raises(ValueError, match=message):
        use_backend("cuda")
    assert _extension.backend() == "auto"
