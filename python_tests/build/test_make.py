"""The Makefile, against a Python that only writes down what it was asked to do."""

import os
import re
import shutil
import subprocess

import pytest

from python_tests.support import ROOT

INSTALL = "-m pip install --disable-pip-version-check --constraint constraints.txt"
BUILD = "setup.py build_ext --inplace"


def write_script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "ops.cpp").touch()
    write_script(
        tmp_path / "fake_python",
        '[ "$1" = -c ] && exec echo cpython-0',
        f'echo "$@" >> {tmp_path}/calls',
        '[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/bin/pip"',
        "true",
    )
    return tmp_path


def make(checkout, *arguments):
    """What Python was asked to do by one call of make."""
    (checkout / "calls").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "VENV"))}
    subprocess.run(
        ["make", f"PYTHON={checkout / 'fake_python'}", *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        check=True,
    )
    return (checkout / "calls").read_text().splitlines()


def change(checkout, name):
    """Make one file newer than everything else, however coarse the clock."""
    for path in checkout.rglob("*"):
        os.utime(path, (0, 0))
    (checkout / name).touch()


def test_first_call_installs_builds_and_runs_the_second_only_runs(checkout):
    first = make(checkout, "test")
    assert first == [
        "-m venv .venv",
        f"{INSTALL} torch ninja pybind11 setuptools",
        f"{INSTALL} --no-build-isolation --editable .[test]",
        BUILD,
        "-m pytest",
    ]
    assert make(checkout, "test") == ["-m pytest"]
    assert make(checkout, "train") == ["-m train"]
    assert make(checkout, "bench") == ["-m bench"]
    assert make(checkout, "gpu") == ["-m python_tests.gpu first"]  # which builds for itself
    assert make(checkout, "gpu-rest") == ["-m python_tests.gpu rest"]
    assert make(checkout, "gpu-sweep") == ["-m python_tests.gpu sweep"]


def test_changed_source_is_built_and_changed_pins_are_installed(checkout):
    make(checkout, "test")
    change(checkout, "csrc/ops.cpp")
    assert make(checkout, "test") == [BUILD, "-m pytest"]
    change(checkout, "constraints.txt")
    assert [call.split(" ")[1] for call in make(checkout, "test")] == ["pip", "pip", "pytest"]


def test_ambient_python_is_only_built_for(checkout):
    assert make(checkout, "test", "VENV=") == [BUILD, "-m pytest"]
    assert make(checkout, "test", "VENV=") == ["-m pytest"]
    assert make(checkout, "gpu", "VENV=") == ["-m python_tests.gpu first"]
    assert not (checkout / ".venv").exists()


def test_old_python_is_refused(checkout):
    write_script(checkout / "fake_python", 'exec python3 -c "import sys; sys.version_info = (3, 9); $2"')
    made = subprocess.run(["make", "test", "PYTHON=./fake_python"], cwd=checkout, capture_output=True, text=True)
    assert made.returncode == 2
    assert "cbn_ext needs Python 3.10 or newer; ./fake_python is " in made.stderr


def test_missing_python_is_named(checkout):
    made = subprocess.run(["make", "test", "PYTHON=no_python"], cwd=checkout, capture_output=True, text=True)
    assert made.returncode == 2
    assert "cbn_ext needs Python 3.10 or newer; no_python was not found" in made.stderr


def test_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make ([\w-]+)\t\S", listed, re.MULTILINE) == [
        *["help", "train", "test", "bench", "gpu", "gpu-rest", "gpu-sweep", "lint"]
    ]
