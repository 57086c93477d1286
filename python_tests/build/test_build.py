"""The build: toolkit, host torch, compiler, pins. No test here downloads or compiles anything."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
from setuptools.config.pyprojecttoml import load_file
from torch.utils import cpp_extension

from build_backend import host_torch, resolve, toolkit
from python_tests.support import ROOT

PYPROJECT = load_file(ROOT / "pyproject.toml")
PINS = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def write_script(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def make_toolkit(home, version="13.0", header="include/cuda_runtime.h", tells_top=True):
    """A tree that looks like a CUDA toolkit, with an nvcc that answers --version and --dryrun."""
    lines = [f'[ "$1" = --version ] && echo "Cuda compilation tools, release {version}, V{version}.88"']
    if tells_top:
        lines.append(f"[ \"$1\" = --dryrun ] && echo '#$ TOP={home}/bin/..' >&2")
    write_script(home / "bin" / "nvcc", *lines, "true")
    if header:
        (home / header).parent.mkdir(parents=True)
        (home / header).touch()
    return home


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which nothing of CUDA is to be found; `machine / "bin"` is all of its PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolkit, "USUAL_FOLDERS", (tmp_path / "usual",))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    return tmp_path


class TestToolkit:
    def test_nothing_there(self, machine):
        assert toolkit.find_toolkit("13.0") == (None, [])

    def test_wrapper_script_on_path(self, machine):
        home = make_toolkit(machine / "real")
        write_script(machine / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
        assert toolkit.find_toolkit("13.0") == (toolkit.Toolkit(home, "13.0", "nvcc --dryrun"), [])

    def test_link_to_an_nvcc_that_does_not_tell_its_top(self, machine):
        home = make_toolkit(machine / "real", tells_top=False)
        (machine / "bin").mkdir()
        (machine / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
        assert toolkit.find_toolkit("13.0") == (toolkit.Toolkit(home, "13.0", "nvcc on PATH"), [])

    @pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
    def test_variable_comes_before_path(self, machine, monkeypatch, variable):
        home = make_toolkit(machine / "named")
        write_script(machine / "bin" / "nvcc", f'exec {make_toolkit(machine / "other")}/bin/nvcc "$@"')
        monkeypatch.setenv(variable, str(home))
        assert toolkit.find_toolkit("13.0") == (toolkit.Toolkit(home, "13.0", variable), [])

    def test_wrong_cuda_home_is_passed_over(self, machine, monkeypatch):
        home = make_toolkit(machine / "usual" / "cuda")
        monkeypatch.setenv("CUDA_HOME", str(machine / "nowhere"))
        found, rejected = toolkit.find_toolkit("13.0")
        assert found == toolkit.Toolkit(home, "13.0", "usual folder")
        assert rejected == [f"CUDA_HOME {machine / 'nowhere'}: no bin/nvcc"]

    def test_toolkit_without_headers_is_passed_over(self, machine):
        make_toolkit(machine / "usual" / "cuda", header=None)
        assert toolkit.find_toolkit("13.0") == (
            None,
            [f"usual folder {machine / 'usual' / 'cuda'}: no cuda_runtime.h"],
        )

    def test_headers_of_a_target(self, machine):
        home = make_toolkit(machine / "usual" / "cuda", header="targets/sbsa-linux/include/cuda_runtime.h")
        assert toolkit.find_toolkit("13.0")[0].home == home

    def test_another_major_version_is_passed_over(self, machine):
        old = make_toolkit(machine / "usual" / "cuda", version="12.4")
        new = make_toolkit(machine / "usual" / "cuda-13.1", version="13.1")
        found, rejected = toolkit.find_toolkit("13.0")
        assert found == toolkit.Toolkit(new, "13.1", "usual folder")
        assert rejected == [f"usual folder {old}: CUDA 12.4, but torch has 13.0"]

    def test_pip_package(self, machine):
        home = make_toolkit(machine / "site-packages" / "nvidia" / "cu13")
        assert toolkit.find_toolkit("13.0") == (toolkit.Toolkit(home, "13.0", "pip package"), [])


class TestResolve:
    TORCH = Path("site/torch")

    def resolve(self, cuda="13.0", devices=()):
        return resolve.resolve("2.11.0", self.TORCH, cuda, devices)

    def test_cpu_torch(self, machine):
        make_toolkit(machine / "usual" / "cuda")
        plan = self.resolve(cuda=None)
        assert plan.line == f"cbn_ext: torch 2.11.0 in {self.TORCH}; CPU only: this torch has no CUDA"
        assert (plan.cuda_home, plan.archs) == (None, [])

    def test_no_toolkit(self, machine):
        plan = self.resolve()
        assert plan.line.endswith("CUDA toolkit not found; CPU only: there is no toolkit")
        assert (plan.cuda_home, plan.archs) == (None, [])

    def test_cuda_without_gpu(self, machine):
        home = make_toolkit(machine / "usual" / "cuda")
        plan = self.resolve()
        assert plan.line.endswith("CPU and CUDA for 8.0 9.0+PTX (no GPU here, the default)")
        assert (plan.cuda_home, plan.archs) == (home, ["8.0", "9.0+PTX"])

    def test_cuda_with_gpus(self, machine):
        make_toolkit(machine / "usual" / "cuda")
        plan = self.resolve(devices=[(9, 0), (8, 6), (9, 0)])
        assert plan.archs == ["8.6", "9.0"]
        assert plan.line.endswith("CPU and CUDA for 8.6 9.0 (this machine's GPUs)")

    def test_gpu_that_is_too_old(self, machine):
        make_toolkit(machine / "usual" / "cuda")
        assert self.resolve(devices=[(7, 5), (9, 0)]).archs == ["9.0"]
        plan = self.resolve(devices=[(7, 5)])
        assert plan.line.endswith("CPU only: no GPU of compute capability 8.0 or newer")
        assert plan.archs == []

    @pytest.mark.parametrize(
        ("asked", "archs", "left_out"),
        [
            ("7.0 7.5 8.0 8.6 9.0+PTX", ["8.0", "8.6", "9.0+PTX"], "7.0 7.5"),  # as container images preset it
            ("7.5+PTX;10.0", ["10.0"], "7.5+PTX"),
            ("Volta;Turing;Ampere", ["Ampere"], "Volta Turing"),
            ("Kepler+Tesla Maxwell Pascal Hopper", ["Hopper"], "Kepler+Tesla Maxwell Pascal"),
        ],
    )
    def test_architectures_that_are_too_old_are_left_out(self, machine, monkeypatch, asked, archs, left_out):
        make_toolkit(machine / "usual" / "cuda")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        plan = self.resolve()
        assert plan.archs == archs
        assert plan.line.endswith(
            f"CPU and CUDA for {' '.join(archs)} (TORCH_CUDA_ARCH_LIST); left out, older than 8.0: {left_out}"
        )

    def test_architectures_that_are_all_too_old(self, machine, monkeypatch):
        make_toolkit(machine / "usual" / "cuda")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;Turing")
        message = r"expected 8\.0 or newer in TORCH_CUDA_ARCH_LIST, got 7\.0 Turing; FORCE_CUDA=0 builds for the CPU"
        with pytest.raises(SystemExit, match=message):
            self.resolve()
        assert self.resolve(cuda=None).line.endswith("CPU only: this torch has no CUDA")
        monkeypatch.setenv("FORCE_CUDA", "0")
        assert self.resolve().line.endswith("CPU only: FORCE_CUDA=0")

    @pytest.mark.parametrize(
        "name",
        ["Kepler", "Maxwell", "Pascal", "Volta", "Volta+Tegra", "Turing", "Ampere", "Ada", "Hopper", "Blackwell"],
    )
    def test_named_architecture_is_as_old_as_torch_says(self, machine, monkeypatch, name):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
        numbers = re.findall(r"sm_(\d+)", " ".join(cpp_extension._get_cuda_arch_flags()))
        make_toolkit(machine / "usual" / "cuda")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"{name};9.0")
        assert self.resolve().archs == (["9.0"] if max(map(int, numbers)) < 80 else [name, "9.0"])

    def test_named_architectures(self, machine, monkeypatch):
        make_toolkit(machine / "usual" / "cuda")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0+PTX")
        plan = self.resolve(devices=[(7, 5)])
        assert plan.archs == ["8.0", "10.0+PTX"]
        assert plan.line.endswith("CPU and CUDA for 8.0 10.0+PTX (TORCH_CUDA_ARCH_LIST)")

    def test_force_cuda_0(self, machine, monkeypatch):
        make_toolkit(machine / "usual" / "cuda")
        monkeypatch.setenv("FORCE_CUDA", "0")
        plan = self.resolve()
        assert plan.line.endswith("CPU only: FORCE_CUDA=0")
        assert plan.archs == []

    @pytest.mark.parametrize(
        ("with_toolkit", "cuda", "why"),
        [(True, None, "this torch has no CUDA"), (False, "13.0", "there is no toolkit")],
    )
    def test_force_cuda_1_fails_rather_than_build_without(self, machine, monkeypatch, with_toolkit, cuda, why):
        if with_toolkit:
            make_toolkit(machine / "usual" / "cuda")
        monkeypatch.setenv("FORCE_CUDA", "1")
        with pytest.raises(SystemExit, match=f"FORCE_CUDA=1, but {why}$"):
            self.resolve(cuda)

    def test_force_cuda_takes_no_other_value(self, machine, monkeypatch):
        monkeypatch.setenv("FORCE_CUDA", "yes")
        with pytest.raises(SystemExit, match="expected FORCE_CUDA=0, FORCE_CUDA=1 or nothing, got FORCE_CUDA=yes"):
            self.resolve()


class TestCompiler:
    def test_first_usual_one_on_path(self, machine, monkeypatch):
        write_script(machine / "bin" / "clang++")
        resolve.choose_compiler()
        assert os.environ["CXX"] == "clang++"
        monkeypatch.delenv("CXX")  # set by the code under test: the fixture does not know of it

    def test_named_one_is_kept(self, machine, monkeypatch):
        write_script(machine / "bin" / "ccache")
        monkeypatch.setenv("CXX", "ccache g++-13")
        resolve.choose_compiler()
        assert os.environ["CXX"] == "ccache g++-13"

    def test_none_on_path(self, machine):
        with pytest.raises(SystemExit, match=r"no C\+\+ compiler: looked for c\+\+, g\+\+, clang\+\+ on PATH"):
            resolve.choose_compiler()

    def test_build_without_compiler_fails(self, tmp_path):
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
        build = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "CXX": "/nonexistent"}, capture_output=True, text=True
        )
        assert build.returncode == 1
        assert "cbn_ext: no C++ compiler: looked for CXX=/nonexistent. Install one" in build.stderr
        assert "Traceback" not in build.stderr
        assert not list(tmp_path.iterdir())


def test_build_without_cuda_removes_the_cuda_library_of_an_earlier_one(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("build_backend", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name)
    package, library = tmp_path / "cbn_ext", tmp_path / "build" / "lib" / "cbn_ext"
    for folder in (package, library):
        folder.mkdir(parents=True)
        (folder / "_C_cuda.abi3.so").touch()
    shutil.copy(ROOT / "cbn_ext" / "_version.py", package)
    environment = {**os.environ, "CXX": "true", "FORCE_CUDA": "0"}  # `true` compiles nothing
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "build/lib"]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert [path.name for path in library.iterdir()] == ["_build.json"]
    assert (package / "_C_cuda.abi3.so").exists()  # a wheel is built: what serves in place is not touched
    # In place, where there is nothing to copy, the removal comes first.
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "build/lib", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert not (package / "_C_cuda.abi3.so").exists()


def install_torch(packages, version):
    """Put a package into this folder that says it is this version of torch."""
    (packages / "torch").mkdir(parents=True)
    (packages / "torch" / "__init__.py").touch()
    information = packages / f"torch-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


def make_environment(folder, torch_version=None):
    """A virtual environment, with such a torch where a version is given; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    if torch_version:
        install_torch(next(folder.glob("lib/python*/site-packages")), torch_version)
    return folder / "bin" / "python"


def make_overlay(folder: Path, *names: str) -> Path:
    """A folder on PYTHONPATH with these of the packages installed here."""
    overlay = folder / "overlay"
    overlay.mkdir()
    for name in names:
        (overlay / name).symlink_to(Path(setuptools.__file__).parent.parent / name)
    return overlay


class TestHostTorch:
    @pytest.mark.parametrize(
        ("installed", "found"),
        [
            ("2.11.0+cu130", True),
            ("3.0.0", True),
            ("2.12.0a0+git1234", True),
            ("2.10.1", False),
            (None, False),
        ],
    )
    def test_version(self, tmp_path, installed, found):
        torch = host_torch.find(str(make_environment(tmp_path / "env", installed)))
        assert (torch.version if torch else None) == (installed if found else None)

    def test_the_isolated_environment_does_not_count(self, tmp_path, monkeypatch):
        install_torch(tmp_path / "overlay", "9.9.9")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "overlay"))
        assert host_torch.find(str(make_environment(tmp_path / "env"))) is None

    def test_user_site_counts(self, tmp_path, monkeypatch):
        """pip hides the user's own packages from an isolated build by PYTHONNOUSERSITE."""
        packages = sysconfig.get_path("purelib", "posix_user", {"userbase": str(tmp_path)})
        install_torch(Path(packages), "9.9.9")
        monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path))
        monkeypatch.setenv("PYTHONNOUSERSITE", "1")
        found = host_torch.find(sys._base_executable)
        assert found.version == "9.9.9"
        assert packages in found.path

    @pytest.mark.parametrize(
        ("installed", "requires"), [("2.11.0", []), ("2.10.1", ["torch>=2.11"]), (None, ["torch>=2.11"])]
    )
    def test_hooks_in_an_isolated_build(self, tmp_path, installed, requires):
        """-S hides the environment's packages, as pip does; the build tools come by PYTHONPATH, as with pip."""
        python = make_environment(tmp_path / "env", installed)
        overlay = make_overlay(tmp_path, "setuptools", "_distutils_hack", "pybind11")
        program = (
            "import importlib.util; from build_backend import backend; "
            "print(backend.get_requires_for_build_editable(), backend.get_requires_for_build_wheel(), "
            "backend.get_requires_for_build_sdist(), importlib.util.find_spec('torch') is not None)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(overlay), str(ROOT)])}
        hooks = subprocess.run(
            [python, "-S", "-c", program],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert hooks.stdout.strip() == f"{requires} {requires} {requires} {installed == '2.11.0'}"

    def test_missing_build_tools_are_named(self, tmp_path):
        """Without isolation nobody has installed them."""
        python = make_environment(tmp_path / "env", "2.11.0")
        overlay = make_overlay(tmp_path, "setuptools", "_distutils_hack")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(overlay), str(ROOT)])}
        program = [python, "-S", "-c", "import build_backend.backend"]
        hooks = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert hooks.returncode == 1
        assert "pip install 'setuptools>=77.0.3,<82' ninja pybind11" in hooks.stderr
        assert "pybind11 missing" in hooks.stderr
        assert "Traceback" not in hooks.stderr


class TestPins:
    def test_every_direct_dependency_is_pinned(self):
        project = PYPROJECT["project"]
        wanted = [*PYPROJECT["build-system"]["requires"], *project["dependencies"]]
        wanted += [name for extra in project["optional-dependencies"].values() for name in extra]
        names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
        assert names - {"cbn_ext"} == set(PINS)

    def test_linters_are_the_same_in_pre_commit(self):
        hooks = (ROOT / ".pre-commit-config.yaml").read_text()
        versions = dict(re.findall(r"/(ruff|mirrors-clang-format)\S*\n\s+rev: v(\S+)", hooks))
        assert versions == {"ruff": PINS["ruff"], "mirrors-clang-format": PINS["clang-format"]}

    def test_torch_requirement_is_the_one_the_backend_asks_for(self):
        assert PYPROJECT["project"]["dependencies"] == [host_torch.REQUIREMENT]
