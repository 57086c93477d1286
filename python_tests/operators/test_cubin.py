"""The compiled CUDA kernels, read from the library: all of them for every architecture, and none that spills.

Where no CUDA library was built there is nothing to read, and the build must have said why.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cbn_ext
from bench.sass.tools import cuobjdump

ARCHITECTURES = ["sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in cbn_ext.build_info()["cuda_archs"]]
TYPES = ["f", "d", "N3c104HalfE", "N3c108BFloat16E"]  # of elements, as they are mangled
COMPONENTS = {"Channel": [1, 2, 4, 8, 16], "Group": [4, 8, 16], "Joint": [4, 8, 16]}  # by posterior
INSTANCES = {
    (dtype, components, channels_last, posterior)
    for posterior, numbers in COMPONENTS.items()
    for dtype, components, channels_last in product(TYPES, numbers, [False, True])
    if posterior == "Channel" or dtype != "d" or components == 16
}
#: Kernels of an instance, by whether it has joint mode, forms for whole chunks, and responsibilities with a gradient.
KERNELS = {
    (False, True, True): 13,
    (False, True, False): 10,
    (False, False, True): 8,
    (False, False, False): 6,
    (True, True, True): 12,
    (True, False, True): 10,
}
REGISTERS_OF_MULTIPROCESSOR = 65536


class Kernel(NamedTuple):
    """One compiled kernel, by its mangled name without the instance."""

    architecture: str
    name: str
    instance: tuple[str, int, bool, str]


class Resources(NamedTuple):
    """What a thread has: registers, and bytes of memory for what did not fit into them or is indexed at run time."""

    registers: int
    stack: int
    local: int


def lines(*options: str) -> Iterator[tuple[str, str]]:
    """Architecture and line of what cuobjdump prints about the library, nothing without one."""
    if not ARCHITECTURES:
        return
    architecture = ""
    for line in cuobjdump(next(Path(cbn_ext.__file__).parent.glob("_C_cuda.*")), *options):
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        yield architecture, line


def kernel(architecture: str, mangled: str) -> Kernel | None:
    """The kernel of a name; None for functions that are not compiled for an instance."""
    config = re.search(r"6ConfigI(\w+?)Li(\d+)ELb([01])ENS_\d+(\w+?)PosteriorEEE", mangled)
    if config is None:
        return None
    instance = (config[1], int(config[2]), config[3] == "1", config[4])
    return Kernel(architecture, mangled.replace(config[0], ""), instance)


@functools.cache
def resources() -> dict[Kernel, Resources]:
    found, current = {}, None
    for architecture, line in lines("-res-usage"):
        if name := re.match(r" Function (\S+):", line):
            current = kernel(architecture, name[1])
        elif current and (used := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line)):
            found[current] = Resources(*map(int, used.groups()))
    return found


@functools.cache
def largest_blocks() -> dict[Kernel, int]:
    """Threads that a block may have at most, as the kernels were promised (__launch_bounds__)."""
    found, current, wanted = {}, None, False
    for architecture, line in lines("-elf"):
        if line.startswith(".nv.info."):
            current = kernel(architecture, line.strip().removeprefix(".nv.info."))
        elif "EIATTR_MAX_THREADS" in line:
            wanted = True
        elif wanted and "Value:" in line:
            wanted = False
            if current:
                found[current] = int(line.split()[1], 16)
    return found


def kind(instance: tuple[str, int, bool, str]) -> tuple[bool, bool, bool]:
    """The key of an instance in KERNELS."""
    dtype, components, _, posterior = instance
    fast = dtype != "d" and components <= 8 and posterior != "Group"
    return posterior == "Joint", fast, components > 1 and posterior != "Group"


def test_every_kernel_is_there_for_every_architecture():
    kernels = defaultdict(set)
    for found in resources():
        kernels[found.architecture, found.instance].add(found.name)
    assert set(kernels) == set(product(ARCHITECTURES, INSTANCES))
    assert ARCHITECTURES or "; CPU only: " in cbn_ext.build_info()["resolved"]
    names = defaultdict(set)
    for (_, instance), of_instance in kernels.items():
        assert len(of_instance) == KERNELS[kind(instance)], instance
        names[kind(instance)] |= of_instance
    assert all(len(of_kind) == KERNELS[key] for key, of_kind in names.items())


def test_nothing_spills_up_to_8_components():
    small = {found: used for found, used in resources().items() if found.instance[1] <= 8}
    assert not {found: used for found, used in small.items() if used.stack or used.local}


def test_registers_fit_the_largest_block():
    threads = largest_blocks()
    assert threads.keys() == resources().keys()
    for found, most in threads.items():
        assert most * resources()[found].registers <= REGISTERS_OF_MULTIPROCESSOR, found


def test_blocks_of_the_streaming_kernels_share_a_multiprocessor():
    """Of those for whole chunks, contiguous, up to 4 components: 4 of 256 threads, 3 with the whole gradient."""
    checked = Counter()
    for found, used in resources().items():
        _, components, channels_last, posterior = found.instance
        number = re.search(r"LNS_4PassE(\d)ELNS_5FormsE0E", found.name)
        if number and posterior == "Channel" and not channels_last and components <= 4:
            blocks = 3 if number[1] == "3" else 4
            assert largest_blocks()[found] == 256
            assert blocks * 256 * used.registers <= REGISTERS_OF_MULTIPROCESSOR, found
            checked[found.architecture] += 1
    # Three types; five passes, without a mixture four.
    assert checked == dict.fromkeys(ARCHITECTURES, 3 * (4 + 5 + 5))


def test_a_cluster_waits_for_memory_once():
    """Before its sums are read. The barrier at the end must not wait until all of the output has been written."""
    pattern = r" Function (\S*15resident_kernel\S*ConfigIfLi4E\S*ChannelPosterior\S*):"
    functions = (re.match(pattern, line) for _, line in lines("-res-usage"))
    names = sorted({function[1] for function in functions if function})
    for architecture in ARCHITECTURES:
        if int(architecture.removeprefix("sm_")) < 90:
            continue  # no clusters
        found = Counter()
        for _, line in lines("-sass", "-arch", architecture, "-fun", ",".join(names)):
            found.update(re.findall(r"MEMBAR\.ALL\.GPU|UCGABAR_ARV", line))
        assert len(names) == 6
        assert found == {"MEMBAR.ALL.GPU": len(names), "UCGABAR_ARV": 2 * len(names)}
