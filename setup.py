"""Builds the native libraries of cbn_ext; the metadata stands in pyproject.toml."""

import json
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

from build_backend import host_torch
from build_backend.resolve import choose_compiler, resolve

try:
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(f"cbn_ext: building needs {host_torch.REQUIREMENT}; {sys.executable} has none") from error
if not host_torch.is_supported(torch.__version__):
    raise SystemExit(f"cbn_ext: building needs {host_torch.REQUIREMENT}, got torch {torch.__version__}")


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


# ninja is there too where the environment was not activated.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])

plan = resolve(
    torch.__version__,
    Path(torch.__file__).parent,
    torch.version.cuda,
    [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())],
)
if plan.cuda_home is not None:
    os.environ["CUDA_HOME"] = str(plan.cuda_home)
if plan.archs:
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(plan.archs)

# torch looks for the toolkit, in its own way, as soon as this is imported.
import pybind11  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


class Build(BuildExtension):
    """Compiles, prints what is built and why, and keeps that beside the libraries for ``build_info``."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # The same for every way to build: pip would take a fresh one each time and compile everything again.
        self.build_temp = str(Path("build", sys.implementation.cache_tag))

    def run(self) -> None:
        choose_compiler()
        print(plan.line, flush=True)
        package = Path(self.get_ext_fullpath("cbn_ext._host")).parent
        if not plan.archs:
            # One from an earlier build would be loaded, or packed into a wheel, beside operators of another version.
            for folder in {package.resolve(), Path(self.build_lib, "cbn_ext").resolve()}:
                for stale in folder.glob("_C_cuda.*"):
                    stale.unlink()
        super().run()
        facts = {"torch": torch.__version__, "cuda_archs": plan.archs, "resolved": plan.line}
        (package / "_build.json").write_text(json.dumps(facts, indent=2))


def stable_abi() -> dict:
    """Only the stable interface of torch 2.11 and later: one library for all of them."""
    return {
        "define_macros": [("TORCH_TARGET_VERSION", "0x020b000000000000")],
        "include_dirs": [HEADERS],
        "py_limited_api": True,
    }


NO_PATHS = f"-ffile-prefix-map={Path.cwd()}/="
CXX_FLAGS = ["-O3", "-g0", NO_PATHS, "-ffp-contract=fast", "-Wno-psabi"]
# No fast-math: the few approximations that are allowed are named in csrc/cuda/device.cuh.
NVCC_FLAGS = ["-O3", f"-Xcompiler={NO_PATHS}", "-Xptxas=-warn-spills"]
HEADERS = str(Path("csrc").resolve())
HOST = "csrc/host.cpp"

operators = [source for source in sources("*.cpp", "cpu/*.cpp") if source != HOST]
extensions = [
    CppExtension("cbn_ext._C", operators, extra_compile_args=CXX_FLAGS, **stable_abi()),
    # pybind11 does not fit the limited API: this module is for one version of Python. It links no torch.
    Extension(
        "cbn_ext._host",
        [HOST],
        include_dirs=[HEADERS, pybind11.get_include()],
        extra_compile_args=[*CXX_FLAGS, "-fvisibility=hidden"],
        language="c++",
    ),
]
if plan.archs:
    # A library of its own: on a CPU torch one with CUDA in it would not load.
    flags = {"cxx": ["-DUSE_CUDA", *CXX_FLAGS], "nvcc": ["-DUSE_CUDA", *NVCC_FLAGS]}
    kernels = sources("cuda/*.cu", "cuda/*.cpp")
    cuda = CUDAExtension("cbn_ext._C_cuda", kernels, extra_compile_args=flags, **stable_abi())
    # By the name of its file: the toolkit that pip installs has no libcudart.so.
    runtime = f":libcudart.so.{torch.version.cuda.split('.')[0]}"
    cuda.libraries = [runtime if name == "cudart" else name for name in cuda.libraries]
    extensions.append(cuda)

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
