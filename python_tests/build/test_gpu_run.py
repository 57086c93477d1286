"""The three runs on a GPU, to the end, with other programs in place of those that need one."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from build_backend.toolkit import Toolkit
from python_tests.gpu import report, steps, training_steps
from python_tests.gpu.report import Outcome
from python_tests.gpu.steps import TOTAL_SECONDS, Device
from python_tests.support import ROOT

DEVICE = Device("a GPU", "9.0", "13.0")
LOGS = Path("build", "gpu", "first")

# Everything as it is, but for the steps, the GPU and the benchmark's summary.
PROGRAM = """
import json, sys, types
from python_tests.gpu import __main__ as gpu
from python_tests.gpu.steps import Device, Step

planned, constants = json.loads(sys.argv[1])
vars(gpu).update(constants)
gpu.find_device = lambda: Device("a GPU", "9.0", "13.0")
gpu.steps = lambda run, device: [Step(**step) for step in planned]
sys.modules["bench.cuda.report"] = types.SimpleNamespace(
    summary=lambda folder: [f"target in {path.name}: {float(path.read_text())}" for path in folder.glob("cuda-*.csv")]
)
sys.exit(gpu.main(["first"]))
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts a run of such steps, (name, shell command) or the arguments of Step; its process."""

    def run(*planned, stdout=subprocess.PIPE, out="out", **constants):
        planned = [
            step if isinstance(step, dict) else {"name": step[0], "command": ["sh", "-c", step[1]]} for step in planned
        ]
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps([planned, constants])],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "GPU_OUT": out},
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.fixture
def run(start):
    """A function that makes such a run: its exit status, what it printed and the summary's lines."""

    def to_end(*planned, **options):
        process = start(*planned, **options)
        output = process.communicate()[0]
        return process.returncode, output, output[output.rindex("--- first: a GPU") :].splitlines()

    return to_end


def results(summary):
    """By step, without the times."""
    found = dict(match.groups() for line in summary if (match := re.match(r"(\S+) +\d+ s  (.*)", line)))
    return {name: re.sub(r" after \d+ s$", "", result) for name, result in found.items()}


def archived(folder):
    """The archive's files, by name."""
    with tarfile.open(folder / "out" / "gpu-first.tgz") as archive:
        return {name: archive.extractfile(name).read().decode() for name in archive.getnames()}


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


def alive(pid):
    """A process that has ended may wait for someone to ask how."""
    stat = Path("/proc", pid.strip(), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_all_well(run, tmp_path):
    bench = {"name": "bench", "command": ["echo", "{seconds}", "{}"], "seconds": 90, "environment": {"A": "b"}}
    tests = {"name": "tests", "command": ["sh", "-c", "echo === 27 passed in 9s ===; echo $A"], "proof": r"\d+ passed"}
    status, _, summary = run(("build", "echo built"), tests, bench)
    assert status == 0
    assert results(summary) == {"build": "ok", "tests": "ok  27 passed", "bench": "ok"}
    assert (tmp_path / LOGS / "tests.log").read_text() == "=== 27 passed in 9s ===\n\n"
    assert (tmp_path / LOGS / "bench.log").read_text() == "70 {}\n"  # with time to come to an end
    files = archived(tmp_path)
    assert results(files.pop("build/gpu/first/summary.txt").splitlines()) == results(summary)
    assert files == {f"build/gpu/first/{path.name}": path.read_text() for path in (tmp_path / LOGS).glob("*.log")}


def test_steps_after_one_that_failed_run_and_the_end_tells(run, tmp_path):
    (tmp_path / "test_many.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(300))\ndef test(i):\n    assert i % 10 == 0, 'long ' * 99\n"
    )
    status, _, summary = run(
        ("build", "true"),
        ("program", f"{sys.executable} -c 'x = 1\nraise ValueError(x)'"),
        ("shell", "no_such_program; exit 3"),
        {"name": "missing", "command": ["no_such_program"]},
        ("tests", f"{sys.executable} -m pytest -ra test_many.py"),
        ("last", "true"),
    )
    assert status == 1
    assert results(summary) == {
        "build": "ok",
        "program": "failed, exit status 1",
        "shell": "failed, exit status 3",
        "missing": "failed",
        "tests": "failed, exit status 1",
        "last": "ok",
    }
    failed = summary[summary.index("--- failed") + 1 :]
    assert failed[0] == "program: ValueError: 1"
    assert re.fullmatch(r"shell: sh: .*no_such_program: (command )?not found", failed[1])
    assert failed[2] == "missing: [Errno 2] No such file or directory: 'no_such_program'"
    assert failed[3].startswith("tests: test_many.py::test[1] - AssertionError: long long ")
    assert int(re.fullmatch(r"tests: and (\d+) more", failed[-1])[1]) + len(failed[3:-1]) == 270
    assert max(map(len, summary)) <= 160


def test_share_of_the_time_that_is_left(run, tmp_path):
    shared = {"command": ["echo", "{seconds}"], "share": 0.5}
    run({"name": "part", **shared}, {"name": "shorter", "seconds": 30, **shared})
    assert 0.4 * TOTAL_SECONDS < int((tmp_path / LOGS / "part.log").read_text()) + 20 <= 0.5 * TOTAL_SECONDS
    assert (tmp_path / LOGS / "shorter.log").read_text() == "10\n"


def test_build_that_fails_is_the_end(run):
    compiled = "echo 'FAILED: [code=1] x.o'; echo 'x.cu(12): error: wrong'; echo 'error: all'; exit 1"
    status, _, summary = run(("build", compiled), ("tests", "true"))
    assert status == 1
    assert results(summary) == {"build": "failed, exit status 1", "tests": "not run"}
    assert summary[-1] == "build: x.cu(12): error: wrong"


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4",
            "========= Invalid __global__ rea",
        ),
        ("========= Error: Race reported\n========= RACECHECK SUMMARY: 1", "========= Error: Race reported"),
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n", "==ERROR== ERR_NVGPUCTRPERM - no perm"),
        ("a\nFAILED: 64x64: ours is wrong\nwrote x", "FAILED: 64x64: ours is wrong"),
        ("ERROR python_tests/gpu/test_a.py - ImportError: b\n", "test_a.py - ImportError: b"),
        ("a\nb\n\n", "no error in its output, which ends: b"),
        ("", "it printed nothing"),
    ],
)
def test_first_line_that_looks_like_an_error(log, line):
    (found,) = report.failures(log)
    assert found.startswith(line)


def test_proof_is_demanded(run):
    """Sanitizers that looked at nothing are no success, nor is a planted error that nobody found."""
    found = {"proof": "Invalid.*read"}
    planted = {**found, "must_fail": True}
    status, _, summary = run(
        {"name": "shown", "command": ["echo", "an Invalid 4 byte read"], **found},
        {"name": "empty", "command": ["echo", "no kernels"], **found},
        {"name": "planted", "command": ["sh", "-c", "echo Invalid read; exit 1"], **planted},
        {"name": "unseen", "command": ["true"], **planted},
        {"name": "broken", "command": ["false"], **planted},
    )
    assert status == 1
    assert results(summary) == {
        "shown": "ok  Invalid 4 byte read",
        "empty": "failed, expected output with Invalid.*read",
        "planted": "ok  Invalid read",
        "unseen": "failed, exit status 0",
        "broken": "failed, expected output with Invalid.*read",
    }


def test_step_that_takes_too_long_ends_with_all_that_it_started(run, tmp_path):
    stubborn = "trap '' INT; (sleep 300 & echo $! > grandchild; wait) & echo $! > child; sleep 300"
    left_behind = "sleep 300 & echo $! > left_behind"
    status, _, summary = run(
        {"name": "stubborn", "command": ["sh", "-c", stubborn], "seconds": 3},
        ("leaves", left_behind),
        GRACE_SECONDS=0.5,
    )
    assert status == 1
    assert results(summary) == {"stubborn": "stopped", "leaves": "ok"}
    for name in ("child", "grandchild", "left_behind"):
        assert not alive((tmp_path / name).read_text())


def test_time_that_is_used_up(run):
    status, _, summary = run(("one", "sleep 300"), ("two", "true"), ("three", "true"), TOTAL_SECONDS=3)
    assert status == 1
    assert results(summary) == {"one": "stopped", "two": "no time left", "three": "no time left"}


def test_pytest_that_is_stopped_tells_what_it_has_seen(start, tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, time\n"
        "def test_wrong():\n    assert 1 == 2\n"
        "def test_slow():\n    pathlib.Path('begun').touch()\n    time.sleep(300)\n"
    )
    process = start(("tests", f"exec {sys.executable} -m pytest -ra test_slow.py"))
    wait_for((tmp_path / "begun").exists)
    process.terminate()
    summary = process.communicate()[0].splitlines()
    assert results(summary)["tests"] == "interrupted"
    assert summary[-1] == "tests: test_slow.py::test_wrong - assert 1 == 2"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_interruption_loses_nothing(number, start, tmp_path):
    process = start(("first", "echo done"), ("second", "echo begun; echo $$ > pid; exec sleep 300"), ("third", "true"))
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 1
    assert not alive((tmp_path / "pid").read_text())
    files = archived(tmp_path)
    assert files["build/gpu/first/second.log"] == "begun\n"
    for summary in (output[output.rindex("--- first") :], files["build/gpu/first/summary.txt"]):
        assert results(summary.splitlines()) == {
            "first": "ok",
            "second": "interrupted",
            "third": "not run",
        }


def test_archive_after_each_step(run, tmp_path):
    listing = "tar tzf out/gpu-first.tgz"
    (tmp_path / "bench" / "results").mkdir(parents=True)
    status, _, _ = run(("one", "echo 1"), ("two", f"{listing}; echo 3 > bench/results/cuda-a.csv"), ("three", listing))
    assert status == 0
    files = archived(tmp_path)
    logs = [f"build/gpu/first/{name}" for name in ("one.log", "three.log", "two.log", "summary.txt")]
    assert files["build/gpu/first/two.log"].split() == sorted([logs[0], logs[3]])
    assert files["build/gpu/first/three.log"].split() == [
        *["bench/results/cuda-a.csv"],
        *sorted([logs[0], logs[2], logs[3]]),
    ]
    assert sorted(files) == sorted(["bench/results/cuda-a.csv", *logs])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu-first.tgz"]


def test_archive_of_a_run_that_was_killed(start, tmp_path):
    process = start(("one", "echo 1"), ("two", "echo $$ > pid; exec sleep 300"))
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    process.kill()
    process.communicate()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    files = archived(tmp_path)
    assert files["build/gpu/first/one.log"] == "1\n"
    assert results(files["build/gpu/first/summary.txt"].splitlines()) == {"one": "ok", "two": "not run"}


def test_archive_within_a_long_step(run):
    seen = "tar xzOf out/gpu-first.tgz build/gpu/first/long.log 2>/dev/null | grep -q begun"
    status, _, _ = run(("long", f"echo begun; until {seen}; do sleep 0.1; done"), TOTAL_SECONDS=30, ARCHIVE_SECONDS=0.5)
    assert status == 0


def test_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    status, output, summary = run(("one", "true"), ("two", "true"), out="file")
    assert status == 0 and results(summary) == {"one": "ok", "two": "ok"}
    assert "the archive could not be written: " in output


def test_logs_of_an_earlier_run_are_gone(run, tmp_path):
    run(("one", "true"))
    run(("two", "true"))
    assert sorted(path.name for path in (tmp_path / LOGS).iterdir()) == ["summary.txt", "two.log"]


def test_nobody_reads(start, tmp_path):
    reader, writer = os.pipe()
    process = start(("one", "echo 1"), ("two", "echo 2"), stdout=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait() == 0
    assert results(archived(tmp_path)["build/gpu/first/summary.txt"].splitlines()) == {"one": "ok", "two": "ok"}


def test_benchmark_of_this_run_is_told(run, tmp_path):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (folder / "cuda-a.csv").write_text("1")
    os.utime(folder / "cuda-a.csv", (0, 0))
    _, _, summary = run(("bench", "false"))
    assert summary[-1].startswith("bench: ")
    status, _, summary = run(("bench", "echo 2 > bench/results/cuda-a.csv"))
    assert status == 0
    assert summary[-2:] == ["--- benchmark", "target in cuda-a.csv: 2.0"]
    assert archived(tmp_path)["build/gpu/first/summary.txt"].splitlines()[-2:] == summary[-2:]


def test_benchmark_that_cannot_be_told_hides_nothing_else(run, tmp_path):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    status, _, summary = run(("bench", "echo broken > bench/results/cuda-a.csv"), ("last", "true"))
    assert status == 1
    assert results(summary) == {"bench": "ok", "last": "ok"}
    assert summary[-1].startswith("ValueError: ")
    assert archived(tmp_path)["bench/results/cuda-a.csv"] == "broken\n"


def test_huge_logs_are_cut_in_the_archive(tmp_path):
    megabyte = 1 << 20
    for i in range(13):
        with (tmp_path / f"{i}.log").open("wb") as log:
            log.write(b"begin\n" + os.urandom(megabyte) + bytes(40 * megabyte) + b"\nend")
    report.write_archive(tmp_path / "out" / "all.tgz", [tmp_path])
    assert (tmp_path / "out" / "all.tgz").stat().st_size < 16 * megabyte
    with tarfile.open(tmp_path / "out" / "all.tgz") as archive:
        content = archive.extractfile(next(name for name in archive.getnames() if name.endswith("/3.log"))).read()
    assert content.startswith(b"begin\n") and content.endswith(b"\nend")
    note = re.search(rb"\n\[\.\.\. (\d+) bytes left out \.\.\.\]\n", content)
    assert len(content) - len(note[0]) + int(note[1]) == 41 * megabyte + 10


@pytest.mark.parametrize("failed", [1, 7, 13])
def test_summary_has_at_most_100_lines(failed):
    names = [f"step{i}" for i in range(13)]
    outcomes = {name: Outcome(1, "failed", ["a" * 1000] * 500) for name in names[:failed]}
    lines = report.summary("rest", names, outcomes)
    assert len(lines) + 1 + report.BENCHMARK_LINES <= 100
    for name in names[:failed]:
        found = [line for line in lines if line.startswith(f"{name}: ")]
        assert 1 <= len(found) <= 21
        assert int(re.search(r"and (\d+) more$", found[-1])[1]) + len(found) - 1 == 500


def collect(selections):
    """The tests that each of such lists of arguments selects."""
    program = """
import contextlib, io, json, sys, pytest

class Items:
    def pytest_collection_finish(self, session):
        self.ids = [item.nodeid for item in session.items]

found = []
for selection in json.loads(sys.argv[1]):
    items = Items()
    with contextlib.redirect_stdout(io.StringIO()):
        assert pytest.main([*selection, "--collect-only", "-q"], plugins=[items]) == 0
    found.append(items.ids)
print(json.dumps(found))
"""
    command = [sys.executable, "-c", program, json.dumps(selections)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def test_first_and_rest_run_every_test_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = [*steps.steps("first", DEVICE), *steps.steps("rest", DEVICE)]
    tests = [step.command[3:] for step in planned if step.command[1:3] == ["-m", "pytest"]]
    every, *parts = collect([["python_tests/gpu"], *tests])
    assert all(parts)
    assert sorted(every) == sorted(test for part in parts for test in part)
    small = next(step.command for step in planned if step.name == "small")
    for name in ("memcheck", "racecheck", "synccheck"):
        assert next(step.command for step in planned if step.name == name)[-len(small) :] == small


@pytest.mark.parametrize("name", ["first", "rest", "sweep"])
def test_plan(name, monkeypatch):
    """What is prepared in each, and that most of the time of `first` is the benchmark's where all goes as expected."""
    monkeypatch.chdir(ROOT)
    planned = steps.steps(name, DEVICE)
    assert [step.name for step in planned[:3]] == ["machine", "build", "library"]
    assert planned[1].environment == {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    assert len({step.name for step in planned}) == len(planned)
    assert planned[-1].seconds == TOTAL_SECONDS
    if name == "first":
        *others, layers, networks = planned
        assert sum(step.seconds for step in others) < TOTAL_SECONDS - steps.RESERVE
        assert (layers.name, networks.name) == ("bench", "network")
        assert 0.5 < layers.share < 1


def test_workers_where_they_are_installed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for installed in (True, False):
        monkeypatch.setattr(steps.importlib.util, "find_spec", lambda _, installed=installed: installed or None)
        with_workers = [step.name for step in steps.steps("first", DEVICE) if "-n" in step.command]
        assert with_workers == (["table", "operators"] if installed else [])


def test_tools_of_cuda(monkeypatch, tmp_path):
    """On PATH, beside nvcc, or nowhere: then the step fails, and says what is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(steps, "find_toolkit", lambda _: (None, []))
    assert steps.find_tool("ncu", DEVICE) == "ncu"
    beside = tmp_path / "toolkit" / "bin" / "ncu"
    beside.parent.mkdir(parents=True)
    beside.touch()
    monkeypatch.setattr(steps, "find_toolkit", lambda _: (Toolkit(tmp_path / "toolkit", "13.0", "a test"), []))
    assert steps.find_tool("ncu", DEVICE) == str(beside)
    assert steps.find_tool("compute-sanitizer", DEVICE) == "compute-sanitizer"
    shutil.copy("/bin/true", tmp_path / "ncu")
    assert steps.find_tool("ncu", DEVICE) == "ncu"


@pytest.fixture
def without_gpu():
    """A function that runs a module of Python where torch sees no GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False}
    return lambda *arguments: subprocess.run([sys.executable, "-m", *arguments], **options)


def test_dry_run_shows_what_would_run(without_gpu, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = ""
    for name in ("first", "rest", "sweep"):
        shown = without_gpu("python_tests.gpu", name, "--dry-run")
        assert shown.returncode == 0
        planned = steps.steps(name, Device("no GPU", "THIS_GPU", ""))
        blocks = shown.stdout.split("\n\n")[1:]
        for step, block in zip(planned, blocks, strict=True):
            title, line = block.splitlines()
            assert title == f"{step.name}, at most {step.seconds} s:"
            words = [word for word in shlex.split(line) if word not in ("PYTHONUNBUFFERED=1", "COLUMNS=300")]
            environment = [f"{name}={value}" for name, value in step.environment.items()]
            seconds = str(step.seconds - steps.RESERVE)
            assert words == [*environment, *(part.replace("{seconds}", seconds) for part in step.command)]
        output += shown.stdout
    for path in (ROOT / "python_tests" / "gpu").glob("test_*.py"):
        assert f"python_tests/gpu/{path.name}" in output


def test_without_a_gpu_nothing_looks_like_success(without_gpu):
    ran = without_gpu("python_tests.gpu")
    assert ran.returncode == 1
    assert re.search("torch finds no CUDA GPU that it can use: .*Error: ", ran.stderr)
    ran = without_gpu("pytest", "-q", "python_tests/gpu")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert "these tests need a CUDA GPU, and torch finds none" in ran.stderr


def test_training_steps(monkeypatch, capsys):
    """Each case on the CPU, and none where there is no time."""
    monkeypatch.setattr(training_steps, "SHAPES", ((2, 3, 4, 5),))
    training_steps.main(60, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not any("left out" in line for line in lines)
    assert lines[0].split() == ["2x3x4x5", str(torch.float32), str(torch.contiguous_format)]
    training_steps.main(-1, "cpu")
    assert all("left out" in line for line in capsys.readouterr().out.splitlines())
