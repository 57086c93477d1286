"""Compiles the CUDA sources as plain C++ against the emulation, with AddressSanitizer, and runs Python with it."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from python_tests.support import ROOT

HERE = Path(__file__).parent

CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent

COMPILER = "g++"  # whatever CXX says: the options and libraries of the sanitizers are its own
COMPILE = (
    "-std=c++20 -Og -g1 -fPIC -Wall -Wno-unknown-pragmas -DCBN_EMULATION -DTORCH_TARGET_VERSION=0x020b000000000000"
)
# These end the process where the device would be wrong: out of bounds, also of shared memory, and misaligned vectors.
# The checks are calls, and local arrays have those of their declared bounds only: it compiles in a third of the time.
SANITIZE = (
    "-fsanitize=address,alignment,bounds,shift -fno-sanitize-recover=all "
    "--param asan-instrumentation-with-call-threshold=0 --param asan-stack=0"
)
LINK = shlex.join([f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"])


def build(name: str, sources: Sequence[Path], csrc: Path = CSRC, objects: Sequence[Path] = ()) -> Path:
    """Bring a library up to date; ninja compiles what has changed.

    Args:
        name: of the library and its folder below build/emulation.
        sources: .cu and .cpp files.
        csrc: the folder of their headers.
        objects: compiled files that are linked too; the emulation itself is compiled where they are not given.

    Returns:
        The library.

    Raises:
        RuntimeError: it does not compile; with the compiler's output.
    """
    folder = ROOT / "build" / "emulation" / name
    folder.mkdir(parents=True, exist_ok=True)
    includes = shlex.join([f"-I{csrc}", f"-I{HERE}", "-isystem", str(TORCH / "include")])
    lines = [
        "rule compile",
        f"  command = {COMPILER} -MMD -MF $out.d {COMPILE} {includes} $sanitize -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} -shared {SANITIZE} $in {LINK} -o $out",
    ]
    linked = [*objects]
    emulation = (HERE / "emulated_device.cpp", HERE / "emulated_runtime.cpp")
    for source in (*sources, *(() if objects else emulation)):
        linked.append(folder / f"{source.name}.o")
        lines += [f"build {_escaped(linked[-1])}: compile {_escaped(source)}"]
        lines += [f"  sanitize = {SANITIZE}"] if source not in emulation else []
    library = folder / f"{name}.so"
    lines += [f"build {_escaped(library)}: link {' '.join(map(_escaped, linked))}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    scripts = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    command = [shutil.which("ninja", path=scripts) or "ninja", "-C", folder]
    command += ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    ninja = subprocess.run(command, capture_output=True, text=True, check=False)
    if ninja.returncode != 0:
        raise RuntimeError(f"{name} does not compile:\n{ninja.stdout}{ninja.stderr}")
    return library


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that loads libraries of the emulation: AddressSanitizer must be there before all else."""
    preloaded = [
        subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")  # the first wants to see the exceptions of the second
    ]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": ":".join(preloaded),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
