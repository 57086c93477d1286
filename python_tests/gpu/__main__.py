"""Everything that needs a GPU, in one call of less than 9 minutes: `make gpu`, or `python -m python_tests.gpu`.

Builds for this machine's GPU, runs the tests beside this file, a few of them under compute-sanitizer, and the
benchmark. A step that fails does not stop those after it, for the machine may be lent only once; the end says what
failed. Each step's output goes to build/gpu/NAME.log.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from build_backend.toolkit import find_toolkit

TOTAL_SECONDS = 525
LOGS = Path("build", "gpu")
TESTS = "python_tests/gpu"


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: int  # it is stopped after so many, or when the total is spent; "{seconds}" in the command is a few less
    environment: dict[str, str] = field(default_factory=dict)
    shown: bool = False  # its output is what people want to see, also where all is well


def steps() -> list[Step]:
    """In their order; the first is what all others need."""
    # By a part of their mangled names only our kernels: PyTorch's are not looked at.
    options = ["--error-exitcode", "1", "--report-api-errors", "no", "--kernel-name", "kns=3cbn", "--tool"]
    sanitizer = [sanitizer_path(), *options]
    small = [sys.executable, "-m", "pytest", f"{TESTS}/test_small.py"]
    # Each tensor in an allocation of its own, so that reading behind its end is seen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 150, {"FORCE_CUDA": "1"}),
        Step("tests", [sys.executable, "-m", "pytest", "--tb=short", TESTS], 180),
        Step("memcheck", [*sanitizer, "memcheck", *small], 60, uncached),
        Step("racecheck", [*sanitizer, "racecheck", *small], 60),
        Step("synccheck", [*sanitizer, "synccheck", *small], 60),
        Step("sass", [sys.executable, "-m", "bench", "sass"], 60, shown=True),
        Step("bench", [sys.executable, "-m", "bench", "cuda", "--seconds", "{seconds}"], 300, shown=True),
    ]


def sanitizer_path() -> str:
    """compute-sanitizer of the toolkit or on PATH; its bare name, whose call fails, where there is none."""
    name = "compute-sanitizer"
    toolkit = find_toolkit(torch.version.cuda)[0]
    beside_nvcc = [toolkit.home / "bin" / name] if toolkit else []
    return next((str(path) for path in beside_nvcc if path.is_file()), shutil.which(name) or name)


def run(step: Step, seconds: float) -> str:
    """The result in a word or two; output goes to the step's log, and its end to the terminal where it fails."""
    log = LOGS / f"{step.name}.log"
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                [part.format(seconds=int(seconds - 20)) for part in step.command],
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160", **step.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            return f"failed: {error}"
        try:
            status = process.wait(seconds)
            result = "ok" if status == 0 else f"failed, exit status {status}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {seconds:.0f} s"
            # As Ctrl-C: pytest reports what it has seen so far.
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").splitlines()
    if step.shown or result != "ok":
        print("\n".join(lines if step.shown else lines[-60:]))
    return result


def main() -> int:
    """Run all steps; 0 if all went well."""
    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA GPU here", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    summary = []
    for step in steps():
        print(f"--- {step.name}", flush=True)
        began = time.monotonic()
        result = run(step, min(step.seconds, max(1, TOTAL_SECONDS - (began - start))))
        summary.append(f"{step.name:<10} {time.monotonic() - began:4.0f} s  {result}")
        print(summary[-1], flush=True)
        if step.name == "build" and result != "ok":
            break
    print("\n".join(["--- make gpu", *summary]))
    return 0 if all(line.endswith("  ok") for line in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
