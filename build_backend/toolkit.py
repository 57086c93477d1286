"""Finds the CUDA toolkit.

torch takes the parent of the folder of `nvcc` for the toolkit. Where nvcc on PATH is a wrapper script, that
is the wrong place and the build fails on cuda_runtime.h.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

USUAL_FOLDERS = (Path("/usr/local"), Path("/opt"))


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str  # such as "13.0"
    origin: str  # how it was found


def find_toolkit(torch_cuda: str) -> tuple[Toolkit | None, list[str]]:
    """The first toolkit that fits a torch of this CUDA version, and why those before it were passed over."""
    rejected: list[str] = []
    seen: set[Path] = set()
    for origin, folder in _candidates(torch_cuda):
        home = folder.resolve()
        if home in seen:
            continue
        seen.add(home)
        problem, version = _examine(home, torch_cuda)
        if problem is None:
            return Toolkit(home, version, origin), rejected
        rejected.append(f"{origin} {folder}: {problem}")
    return None, rejected


def _candidates(torch_cuda: str) -> Iterator[tuple[str, Path]]:
    """Where a toolkit may be, the most reliable source first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield variable, Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # What a wrapper script starts says itself where it lives.
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
        if top is not None:
            yield "nvcc --dryrun", Path(top[1].strip())
        yield "nvcc on PATH", Path(nvcc).resolve().parent.parent
    major = torch_cuda.split(".")[0]
    for folder in USUAL_FOLDERS:
        for home in [folder / "cuda", *sorted(folder.glob(f"cuda-{major}*"), reverse=True)]:
            if home.exists():
                yield "usual folder", home
    for entry in sys.path:
        home = Path(entry, "nvidia", f"cu{major}")
        if home.exists():
            yield "pip package", home


def _examine(home: Path, torch_cuda: str) -> tuple[str | None, str]:
    """What is wrong with a candidate (None where nothing is), and its version."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return "no bin/nvcc", ""
    headers = [home / "include", *home.glob("targets/*/include")]
    if not any((folder / "cuda_runtime.h").is_file() for folder in headers):
        return "no cuda_runtime.h", ""
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", report)
    if release is None:
        return "nvcc --version names no release", ""
    if release[1].split(".")[0] != torch_cuda.split(".")[0]:
        return f"CUDA {release[1]}, but torch has {torch_cuda}", release[1]
    return None, release[1]
