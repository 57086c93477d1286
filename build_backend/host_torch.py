"""Finds the torch that is installed where pip runs, from inside pip's isolated build environment."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

MINIMUM = (2, 11)  # LibTorch's stable ABI has everything csrc needs from this version on
REQUIREMENT = "torch>=" + ".".join(map(str, MINIMUM))

# Looks without importing, which would take seconds. An empty entry is the working folder, where nothing is
# installed.
_PROBE = """
import importlib.metadata, json, sys
sys.path = [entry for entry in sys.path if entry]
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = None
print(json.dumps({"version": version, "path": sys.path}))
"""


@dataclass(frozen=True)
class HostTorch:
    """A torch that is installed, and what a build needs to use it."""

    version: str
    path: list[str]  # sys.path of the interpreter that has it


def is_supported(version: str) -> bool:
    """Whether this version of torch is at least MINIMUM."""
    return tuple(int(part) for part in version.split(".")[:2]) >= MINIMUM


def find(python: str = sys.executable) -> HostTorch | None:
    """The torch installed for ``python``, or None where there is none or it is too old.

    pip isolates a build by two environment variables; without them the interpreter sees its own packages.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    probe = subprocess.run([python, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(probe.stdout)
    if found["version"] is None or not is_supported(found["version"]):
        return None
    return HostTorch(**found)


def expose(torch: HostTorch) -> None:
    """Make the installed torch importable here, behind everything that the build environment itself has."""
    sys.path.extend(entry for entry in torch.path if entry not in sys.path)
