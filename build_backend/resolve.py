"""Decides what a build contains (CPU or CPU and CUDA, for which GPUs) and says why in one line."""

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from build_backend.toolkit import find_toolkit

COMPILERS = ("c++", "g++", "clang++")
# Where no GPU is there to ask: Ampere, whose code runs on Ada too, and Hopper; later ones start from the PTX.
DEFAULT_ARCHS = ("8.0", "9.0+PTX")
OLDEST_ARCH = (8, 0)  # that has the asynchronous copies of the kernels
OLDER_NAMES = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")  # torch's, also followed by +Tesla or +Tegra


@dataclass(frozen=True)
class Plan:
    """What will be built."""

    line: str  # for people: what and why
    cuda_home: Path | None  # the toolkit, where one was found
    archs: list[str]  # compute capabilities of the CUDA library; empty: it is not built


def choose_compiler() -> None:
    """Set CXX, which compiles and links: as it is where it is set, else the first usual compiler on PATH.

    Raises:
        SystemExit: no compiler was found.
    """
    asked = os.environ.get("CXX")
    names = (shlex.split(asked)[0],) if asked else COMPILERS
    found = next((name for name in names if shutil.which(name)), None)
    if found is None:
        looked_for = f"CXX={asked}" if asked else ", ".join(COMPILERS) + " on PATH (CXX is not set)"
        raise SystemExit(
            f"cbn_ext: no C++ compiler: looked for {looked_for}. Install one (Debian: g++) or name it by CXX."
        )
    if not asked:
        os.environ["CXX"] = found


def _is_too_old(arch: str) -> bool:
    """Tell if an entry of TORCH_CUDA_ARCH_LIST, a version or one of torch's names, is older than OLDEST_ARCH."""
    version = re.match(r"(\d+)\.(\d)", arch)
    return tuple(map(int, version.groups())) < OLDEST_ARCH if version else arch.startswith(OLDER_NAMES)


def resolve(
    torch_version: str,
    torch_folder: Path,
    torch_cuda: str | None,
    devices: Sequence[tuple[int, int]] = (),
) -> Plan:
    """Decide between CPU and CPU and CUDA.

    Args:
        torch_version: version of the torch that is built against.
        torch_folder: the folder that it is installed in.
        torch_cuda: its CUDA version, None for a CPU torch.
        devices: compute capabilities of the GPUs in this machine.

    FORCE_CUDA=0 builds for the CPU only; FORCE_CUDA=1 fails rather than build without CUDA;
    TORCH_CUDA_ARCH_LIST names the architectures, of which those that are too old are left out: container images preset
    it to all that torch has.

    Raises:
        SystemExit: FORCE_CUDA=1 and CUDA cannot be built, FORCE_CUDA has another value, or all that
            TORCH_CUDA_ARCH_LIST names is too old.
    """
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        raise SystemExit(f"cbn_ext: expected FORCE_CUDA=0, FORCE_CUDA=1 or nothing, got FORCE_CUDA={force}")
    parts = [f"cbn_ext: torch {torch_version} in {torch_folder}"]
    toolkit = None
    if torch_cuda is not None:
        toolkit, rejected = find_toolkit(torch_cuda)
        found = f"{toolkit.version} in {toolkit.home}, found by {toolkit.origin}" if toolkit else "not found"
        passed_over = f" (passed over: {'; '.join(rejected)})" if rejected else ""
        parts.append(f"CUDA toolkit {found}{passed_over}")

    oldest = ".".join(map(str, OLDEST_ARCH))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    usable = sorted({device for device in devices if device >= OLDEST_ARCH})
    obstacle = None
    if force == "0":
        obstacle = "FORCE_CUDA=0"
    elif torch_cuda is None:
        obstacle = "this torch has no CUDA"
    elif toolkit is None:
        obstacle = "there is no toolkit"
    elif devices and not usable and not asked:
        obstacle = f"no GPU of compute capability {oldest} or newer"
    if obstacle is not None:
        if force == "1":
            raise SystemExit("; ".join([*parts, f"FORCE_CUDA=1, but {obstacle}"]))
        parts.append(f"CPU only: {obstacle}")
        return Plan("; ".join(parts), toolkit.home if toolkit else None, [])

    left_out = [arch for arch in asked if _is_too_old(arch)]
    if asked:
        archs, why = [arch for arch in asked if arch not in left_out], "TORCH_CUDA_ARCH_LIST"
        if not archs:
            raise SystemExit(
                f"cbn_ext: expected {oldest} or newer in TORCH_CUDA_ARCH_LIST, got {' '.join(asked)}; "
                "FORCE_CUDA=0 builds for the CPU only"
            )
    elif devices:
        archs, why = [f"{major}.{minor}" for major, minor in usable], "this machine's GPUs"
    else:
        archs, why = list(DEFAULT_ARCHS), "no GPU here, the default"
    parts.append(f"CPU and CUDA for {' '.join(archs)} ({why})")
    if left_out:
        parts.append(f"left out, older than {oldest}: {' '.join(left_out)}")
    return Plan("; ".join(parts), toolkit.home, archs)
