"""What the three runs do, step by step, and how long each step may take."""

import importlib.util
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from build_backend.toolkit import find_toolkit

TOTAL_SECONDS = 525
#: A step that is told its time is told less by so many seconds, for its report.
RESERVE = 20
TESTS = "python_tests/gpu"
BENCH = [sys.executable, "-m", "bench"]
#: What the mangled names of our kernels contain and no others do: PyTorch's are neither examined nor profiled.
KERNELS = "3cbn"


@dataclass(frozen=True)
class Device:
    """The GPU and the torch that uses it; `cuda` is the CUDA version that torch was built with."""

    name: str
    capability: str
    cuda: str


@dataclass(frozen=True)
class Step:
    """A program with its limits.

    command: "{seconds}" in it becomes the time that the step has, less RESERVE.
    seconds: the longest that it may take; it never takes more than is left of TOTAL_SECONDS.
    proof: a regular expression that its output must match, or it has not done its work; what matches is shown.
    must_fail: it holds a planted error: an exit status of 0 is the failure.
    share: the part that it may take of what is left of TOTAL_SECONDS.
    """

    name: str
    command: list[str]
    seconds: float = TOTAL_SECONDS
    environment: dict[str, str] = field(default_factory=dict)
    proof: str = ""
    must_fail: bool = False
    share: float = 1.0


def steps(run: str, device: Device) -> list[Step]:
    """The steps of "first", "rest" or "sweep". Each run prepares the machine, which may be a fresh one."""
    return [*_prepare(device), *{"first": _first, "rest": _rest, "sweep": _sweep}[run](device)]


def _prepare(device: Device) -> list[Step]:
    facts = [
        "nvidia-smi",
        "nvidia-smi -q -d CLOCK,PERFORMANCE,POWER,TEMPERATURE,MEMORY",
        "nvcc --version",
        f'"{sys.executable}" -m torch.utils.collect_env',
    ]
    architecture = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": device.capability}
    return [
        Step("machine", ["sh", "-c", "; ".join(facts)], 20),
        Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, architecture),
        Step("library", [sys.executable, "-m", "cbn_ext"], 20, proof="cuda_load_error +None"),
    ]


def _first(_: Device) -> list[Step]:
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return [
        _tests("small", 45, "test_small.py"),
        _tests("table", 110, "test_table.py", *workers, "-k", "not sizes_of_networks"),
        _tests("execution", 60, "test_execution.py", "-k", "not memory"),
        _tests("operators", 90, *_other_files(), *workers, "-k", "not more_than_two"),
        Step("bench", [*BENCH, "cuda", "--seconds", "{seconds}"], share=2 / 3),
        Step("network", [*BENCH, "network", "--seconds", "{seconds}"]),
    ]


def _rest(device: Device) -> list[Step]:
    # Each tensor in an allocation of its own, so that reading behind its end is seen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = _tests("small", 45, "test_small.py").command
    planted = [sys.executable, "-m", "python_tests.gpu.planted_error"]
    profiled = [
        *[find_tool("ncu", device), "--csv", "--page", "raw", "--clock-control", "none", "--launch-count", "200"],
        *["--section", "SpeedOfLight", "--section", "Occupancy", "--section", "WarpStateStats"],
        *["--kernel-name-base", "mangled", "--kernel-name", f"regex:{KERNELS}"],
        *[sys.executable, "-m", "python_tests.gpu.training_steps", "{seconds}"],
    ]

    def sanitizer(tool: str, program: list[str]) -> list[str]:
        options = ["--error-exitcode", "1", "--report-api-errors", "no", "--kernel-name", f"kns={KERNELS}"]
        return [find_tool("compute-sanitizer", device), *options, "--tool", tool, *program]

    found = r"Invalid .*\n=+ +at .*cbn"
    no_errors = "[A-Z]+ SUMMARY: 0 .*"
    first_row = '(?m)^"0",.*_kernel'
    return [
        _tests("sizes", 90, "test_table.py", "-k", "sizes_of_networks"),
        _tests("memory", 45, "test_execution.py", "-k", "memory"),
        _tests("large", 60, *_other_files(), "-k", "more_than_two"),
        _tests("training", 75, "test_training.py"),
        # Without this, sanitizers that examined nothing would look like kernels without errors.
        Step("planted", sanitizer("memcheck", planted), 45, uncached, proof=found, must_fail=True),
        Step("memcheck", sanitizer("memcheck", small), 90, uncached, proof=no_errors),
        Step("racecheck", sanitizer("racecheck", small), 90, proof=no_errors),
        Step("synccheck", sanitizer("synccheck", small), 60, proof=no_errors),
        Step("ncu", profiled, 75, proof=first_row),
        Step("ncu-streaming", profiled, environment={"CBN_CUDA_CLUSTER": "0"}, proof=first_row),
    ]


def _sweep(_: Device) -> list[Step]:
    return [
        Step("sweep", [*BENCH, "cuda", "--sweep", "--seconds", "{seconds}"], 330),
        Step("network", [*BENCH, "network", "--seconds", "{seconds}"]),
    ]


def _tests(name: str, seconds: float, *selection: str) -> Step:
    """A step of pytest; names of files in `selection` are those in TESTS."""
    selection = tuple(f"{TESTS}/{part}" if part.endswith(".py") else part for part in selection)
    command = [sys.executable, "-m", "pytest", "--tb=short", *selection]
    return Step(name, command, seconds, proof=r"\d+ passed.*? in [\d.]+s")


def _other_files() -> list[str]:
    """The files of TESTS that have no step of their own, so that none is forgotten."""
    own = {"test_small.py", "test_table.py", "test_execution.py", "test_training.py"}
    return sorted({path.name for path in Path(TESTS).glob("test_*.py")} - own)


def find_tool(name: str, device: Device) -> str:
    """A tool of CUDA, on PATH or beside nvcc; its bare name, whose call fails, where there is none."""
    if shutil.which(name):
        return name
    toolkit = find_toolkit(device.cuda)[0]
    path = toolkit.home / "bin" / name if toolkit else Path(name)
    return str(path) if path.is_file() else name
