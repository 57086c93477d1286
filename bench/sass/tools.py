"""The CUDA toolkit's programs that read compiled kernels. Nothing here needs torch."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def find_tool(name: str, *folders: Path) -> str:
    """A program such as cuobjdump: of the toolkit, of Triton's package, on PATH, or in one of `folders`.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    candidates = [
        Path(os.environ[variable], "bin") for variable in ("CUDA_HOME", "CUDA_PATH") if variable in os.environ
    ]
    if triton := importlib.util.find_spec("triton"):
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for path in (*(folder / name for folder in candidates), shutil.which(name), *(folder / name for folder in folders)):
        if path and Path(path).is_file():
            return str(path)
    raise FileNotFoundError(f"expected {name} in {', '.join(map(str, (*candidates, *folders)))} or on PATH; found none")


def cuobjdump(library: Path, *options: str) -> Iterator[str]:
    """The lines that cuobjdump prints about a library, which may be very many.

    Raises:
        FileNotFoundError: there is no cuobjdump.
        RuntimeError: it failed.
    """
    command = [find_tool("cuobjdump"), *options, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        line = ""
        for line in process.stdout:
            yield line
    if process.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(options)} failed: {line.strip()}")
