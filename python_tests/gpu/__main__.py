"""All that needs a GPU, in three runs of less than 9 minutes each: `python -m python_tests.gpu [first | rest | sweep]`.

`first` (`make gpu`) builds for this GPU, runs the short tests and the benchmarks of layers and whole networks; `rest`
(`make gpu-rest`) runs the long tests, compute-sanitizer and the profiler; `sweep` (`make gpu-sweep`) compares constants
of the launch planning, and gives the networks the time that is left. The machine may be lent only once: a step that
fails does not stop those after it, the end says what failed, and each step's output is in build/gpu/RUN/STEP.log. The
environment variable GPU_OUT names a folder for an archive of it all, gpu-RUN.tgz, which is brought up to date while the
run goes on.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from python_tests.gpu import report
from python_tests.gpu.report import Outcome
from python_tests.gpu.steps import RESERVE, TOTAL_SECONDS, Device, Step, steps

LOGS = Path("build", "gpu")
RESULTS = Path("bench", "results")
#: Tests are reported in lines that are not cut off.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "COLUMNS": "300"}
PROBE_SECONDS = 100
GRACE_SECONDS = 10  # in which a step that is stopped may report
ARCHIVE_SECONDS = 30
SHORTEST_SECONDS = 2  # a step that has less is not begun

_PROBE = """
import torch
torch.ones(1, device="cuda").item()
capability = ".".join(map(str, torch.cuda.get_device_capability()))
print(torch.cuda.get_device_name(), capability, torch.version.cuda, sep="\\n")
"""

interrupted = threading.Event()


def find_device() -> Device:
    """The GPU, asked from a program of its own: this one must not keep memory there.

    Raises:
        RuntimeError: torch cannot compute on a GPU.
        subprocess.TimeoutExpired: it does not answer.
    """
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    if probe.returncode:
        raise RuntimeError((probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"])[-1])
    return Device(*probe.stdout.splitlines()[-3:])


def fill_in(step: Step, seconds: float) -> list[str]:
    """The command of a step that has so much time."""
    return [
        part.format(seconds=max(1, int(seconds) - RESERVE)) if "{seconds}" in part else part for part in step.command
    ]


def say(*lines: str) -> None:
    """Print; the run goes on where nobody reads any more."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(run: str, planned: list[Step]) -> None:
    """What a run would do."""
    print(f"{run}: at most {TOTAL_SECONDS} s")
    for step in planned:
        environment = " ".join(
            f"{name}={shlex.quote(value)}" for name, value in (ENVIRONMENT | step.environment).items()
        )
        print(f"\n{step.name}, at most {step.seconds} s:")
        print(f"{environment} {shlex.join(fill_in(step, step.seconds))}")


class Run:
    """The steps of a run, one after the other, within the time of all."""

    def __init__(self, name: str, device: Device, planned: list[Step], start: float) -> None:
        self.name, self.device, self.steps, self.start = name, device, planned, start
        self.logs = LOGS / name
        self.outcomes: dict[str, Outcome] = {}
        self.saved = start

    def execute(self) -> int:
        """0 if all went well."""
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.began = self.logs.stat().st_mtime
        for step in self.steps:
            if interrupted.is_set():
                break
            say(f"--- {step.name}")
            outcome = self.outcomes[step.name] = self.run(step)
            self.save(self.summary())
            say(f"{outcome.seconds:.0f} s  {outcome.result}", *outcome.failures[:20])
            if step.name == "build" and not outcome.ok:
                break
        # The results may be broken where the benchmark was; then all else has been said.
        say("", *self.summary())
        if benchmark := self.benchmark_summary():
            say(*benchmark)
            self.save([*self.summary(), *benchmark])
        return int(not all(step.name in self.outcomes and self.outcomes[step.name].ok for step in self.steps))

    def run(self, step: Step) -> Outcome:
        begin = time.monotonic()
        limit = min(step.seconds, step.share * (TOTAL_SECONDS - (begin - self.start)))
        if limit < SHORTEST_SECONDS:
            return Outcome(0, "no time left")
        log = self.logs / f"{step.name}.log"
        with log.open("w") as output:
            try:
                process = subprocess.Popen(
                    fill_in(step, limit),
                    env={**os.environ, **ENVIRONMENT, **step.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return Outcome(0, "failed", [str(error)])
        try:
            stopped = self.wait(process, begin + limit)
        finally:
            end(process)
        seconds = time.monotonic() - begin
        text = report.read_ends(log).decode(errors="replace")
        proof = re.search(step.proof, text)
        if stopped:
            result = f"{stopped} after {seconds:.0f} s"
        elif (process.returncode == 0) == step.must_fail:
            result = f"failed, exit status {process.returncode}"
        elif not proof:
            result = f"failed, expected output with {step.proof}"
        else:
            return Outcome(seconds, f"ok  {proof[0].splitlines()[0] if proof[0] else ''}".strip())
        return Outcome(seconds, result, report.failures(text))

    def wait(self, process: subprocess.Popen, end: float) -> str:
        """Until the step ends; else why it has to be stopped."""
        while process.poll() is None:
            if interrupted.is_set():
                self.save(self.summary())  # at once: who interrupts may soon kill
                return "interrupted"
            if time.monotonic() > end:
                return "stopped"
            if time.monotonic() > self.saved + ARCHIVE_SECONDS:
                self.save(self.summary())
            time.sleep(0.1)
        return ""

    def summary(self) -> list[str]:
        title = f"{self.name}: {self.device.name}, {time.monotonic() - self.start:.0f} of {TOTAL_SECONDS} s"
        return report.summary(title, [step.name for step in self.steps], self.outcomes)

    def benchmark_summary(self) -> list[str]:
        """What the benchmark of this run has found out; files of other runs may lie there too."""
        if not any(file.stat().st_mtime >= self.began for file in RESULTS.glob("cuda-*.csv")):
            return []
        from bench.cuda.report import summary

        return ["--- benchmark", *map(report.shorten, summary(RESULTS)[: report.BENCHMARK_LINES])]

    def save(self, summary: list[str]) -> None:
        """Write the summary, and the archive with all that there is so far."""
        self.saved = time.monotonic()
        try:
            (self.logs / "summary.txt").write_text("\n".join([*summary, ""]))
            if folder := os.environ.get("GPU_OUT"):
                report.write_archive(Path(folder, f"gpu-{self.name}.tgz"), [self.logs, RESULTS])
        except OSError as error:
            say(f"the archive could not be written: {error}")


def end(process: subprocess.Popen) -> None:
    """End a step and all that it started."""
    if process.poll() is None:
        # As Ctrl-C: pytest reports what it has seen so far.
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A program that hangs in the driver cannot be killed: the run goes on without it.
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)


def main(arguments: list[str]) -> int:
    """Run all steps of a run; 0 if all went well."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m python_tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", choices=("first", "rest", "sweep"), default="first")
    parser.add_argument("--dry-run", action="store_true", help="print the steps; needs no GPU")
    options = parser.parse_args(arguments)
    try:
        device = find_device()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        if not options.dry_run:
            print(f"make gpu: torch finds no CUDA GPU that it can use: {error}", file=sys.stderr)
            return 1
        device = Device("no GPU", "THIS_GPU", "")
    planned = steps(options.run, device)
    if options.dry_run:
        show(options.run, planned)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    return Run(options.run, device, planned, start).execute()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
