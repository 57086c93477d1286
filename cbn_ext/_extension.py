"""Loads the native libraries once, keeps what went wrong, and holds the choice of backend."""

import importlib
import json
import warnings
from pathlib import Path

import torch

from ._version import __version__

_FOLDER = Path(__file__).parent
_BACKENDS = ("auto", "native", "reference")

# A plain global: torch.compile guards on it, and autograd's threads see it.
_backend = "auto"


def _load(name: str) -> str | None:
    """Load one of the libraries with operators; what went wrong, None where nothing did."""
    library = next(_FOLDER.glob(f"{name}.*"), None)
    if library is None:
        return f"not built: there is no {name} library in {_FOLDER}"
    try:
        torch.ops.load_library(library)
        importlib.import_module("cbn_ext._host")
    except Exception as error:  # whatever is wrong with a library, importing the package must not fail for it
        reason = error.__cause__ or error  # torch's own message names the file only
        return f"{type(reason).__name__}: {reason}"
    return None


def _load_cuda() -> str | None:
    """The same for the CUDA operators, whose schemas the CPU library has. No GPU or driver is needed for it."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if _load_errors["cpu"] is not None:
        return f"the CPU library is needed first: {_load_errors['cpu']}"
    return _load("_C_cuda")


_load_errors = {"cpu": _load("_C")}
_load_errors["cuda"] = _load_cuda()
if _load_errors["cpu"] is not None:
    warnings.warn(
        f"cbn_ext: no native libraries, the slower PyTorch reference is used instead: {_load_errors['cpu']}",
        RuntimeWarning,
        stacklevel=2,
    )


def load_error(device: str = "cpu") -> str | None:
    """Why there are no native operators for this type of device, None where there are."""
    return _load_errors.get(device, f"there are none for {device}")


_warned_devices = {"cpu", "meta"}  # the one at import; on the other nothing is computed


@torch.compiler.assume_constant_result  # called where torch.compile traces, which cannot trace a warning
def warn_of_fallback(device: str) -> None:
    """Say, once per type of device, that "auto" takes the reference because the native operators did not load."""
    if device not in _warned_devices:
        _warned_devices.add(device)
        warnings.warn(
            f"cbn_ext: no native operators for {device}, the much slower PyTorch reference is used instead: "
            f"{load_error(device)}",
            RuntimeWarning,
            stacklevel=2,
        )


def backend() -> str:
    """The backend asked for: "auto", "native" or "reference"."""
    return _backend


class use_backend:  # noqa: N801 - used like a function, as torch.set_grad_enabled is
    """Choose what computes the layers, from now on or for the body of a ``with`` statement.

    Args:
        name: "auto" (the default: native wherever it can, else the reference), "native" (an error where it
            cannot) or "reference" (pure PyTorch).

    Raises:
        ValueError: another name.
        RuntimeError: "native", but its libraries did not load.
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in _BACKENDS:
            raise ValueError(f"expected one of {', '.join(map(repr, _BACKENDS))} as backend, got {name!r}")
        if name == "native" and load_error() is not None:
            raise RuntimeError(f"the native backend is not available: {load_error()}")
        self._previous = _backend
        _backend = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        global _backend
        _backend = self._previous


def build_info() -> dict[str, object]:
    """What is installed and what of it works.

    Returns:
        version: cbn_ext's own.
        torch, torch_built: the torch that runs, and the one that the libraries were built against.
        backends: those that can be used here.
        isa: the instruction set chosen for this CPU, None without the native libraries.
        compiler: what compiled the libraries, None without them.
        cuda_archs: compute capabilities that the CUDA library was compiled for; empty: it was not built.
        resolved: what the build found and decided, in one line.
        load_error: why the native libraries did not load, None where they did.
        cuda_load_error: why the CUDA library did not load, None where it did; it does so without a GPU, too.
    """
    record = _FOLDER / "_build.json"
    built = json.loads(record.read_text()) if record.exists() else {}
    host = importlib.import_module("cbn_ext._host") if load_error() is None else None
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch_built": built.get("torch"),
        "backends": ["native", "reference"] if host else ["reference"],
        "isa": host.cpu_capability() if host else None,
        "compiler": host.build_facts()["compiler"] if host else None,
        "cuda_archs": built.get("cuda_archs", []),
        "resolved": built.get("resolved"),
        "load_error": load_error(),
        "cuda_load_error": load_error("cuda"),
    }
