"""The proof of the emulation: a barrier, a term of an index or a merge goes from the kernels, and the table fails."""

import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from python_tests.emulation.build import CSRC, build
from python_tests.emulation.table import failures, run_table
from python_tests.emulation.test_kernels import DEVICES, MANY_SPLITS
from python_tests.support.cases import Case

# The kernels of two modes, one type and number of components, for both layouts; a source for each mode.
FEW = """
#include "cuda/kernels.cuh"

namespace cbn {
Kernels few_joint_kernels(bool channels_last);
Kernels kernels_float(int, bool channels_last, Mode mode) {
  if (mode == Mode::kJoint) return few_joint_kernels(channels_last);
  return channels_last ? kernels_for<Config<float, 4, true, ChannelPosterior>>()
                       : kernels_for<Config<float, 4, false, ChannelPosterior>>();
}
Kernels kernels_double(int, bool, Mode) { return {}; }
Kernels kernels_half(int, bool, Mode) { return {}; }
Kernels kernels_bfloat16(int, bool, Mode) { return {}; }
}  // namespace cbn
"""
JOINT = """
#include "cuda/kernels.cuh"

namespace cbn {
Kernels few_joint_kernels(bool channels_last) {
  return channels_last ? kernels_for_joint<Config<float, 4, true, JointPosterior>>()
                       : kernels_for_joint<Config<float, 4, false, JointPosterior>>();
}
}  // namespace cbn
"""
SHAPE, WHOLE = (3, 2, 47, 43), (3, 8, 16, 20)  # chunks that are not whole, and that are
CASES = tuple(
    Case(shape, training=training, data=data, layout=layout, activation="relu", residual=residual)
    for layout in ("contiguous", "channels_last")
    for shape, training, data, residual in (
        (SHAPE, True, "mixed", True),
        (SHAPE, True, "equal", False),
        (SHAPE, False, "mixed", False),
        (WHOLE, True, "mixed", True),
        (WHOLE, True, "mixed", False),
        (WHOLE, True, "equal", False),
    )
)
# More channels than a block's warps add up between two flushes, and few of them; points that fill no block; moments
# that are a pass of their own, and not.
JOINT_CASES = tuple(
    Case(shape, mode="joint", layout=layout, activation="relu", residual=residual)
    for layout in ("contiguous", "channels_last")
    for shape, residual in (((3, 300, 3, 13), True), ((2, 530, 5, 5), False), ((3, 5, 11, 13), False))
)


@dataclass(frozen=True)
class Mutation:
    what: str
    file: str
    text: str  # found once
    replacement: str
    device: str  # of `DEVICES`
    sign: str  # of the failure
    cases: Sequence[Case] = CASES

    def __str__(self):
        return self.what


WRONG = "roundoffs|not finite"
OUT_OF_BOUNDS = "AddressSanitizer: heap-buffer-overflow"
MUTATIONS = [
    Mutation(
        "no barrier between the warps' turns",
        "reduce.cuh",
        "    __syncthreads();\n  }\n  for (int i",
        "  }\n  __syncthreads();\n  for (int i",
        "no clusters",
        WRONG,
    ),
    Mutation(
        "no barrier before coefficients are used",
        "posterior.cuh",
        "      __syncthreads();\n      if (C::M == 1 || !bounded || !*shared.flag) return bounded;",
        "      if (C::M == 1 || !bounded || !*shared.flag) return bounded;",
        "streaming",
        WRONG + "|" + OUT_OF_BOUNDS,  # coefficients are not there, nor the number of the widest component
    ),
    Mutation(
        "no barrier of the cluster before its sums",
        "kernels.cuh",
        "  if (a.splits > 1) cluster_sync();\n",
        "",
        "clusters",
        WRONG,
    ),
    Mutation(
        "no arrival after the cluster's sums",
        "kernels.cuh",
        "  if (a.splits > 1) cluster_arrive();\n",
        "",
        "clusters",
        "waits at cluster_wait .* without cluster_arrive before",
    ),
    Mutation(
        "no wait for the cluster after its sums",
        "kernels.cuh",
        "  if (a.splits > 1) cluster_wait();\n",
        "",
        "clusters",
        "ends without cluster_wait after cluster_arrive",
    ),
    Mutation(
        "arrival before the cluster's sums are read",
        "kernels.cuh",
        "  if (a.splits > 1) cluster_sync();\n",
        "  if (a.splits > 1) cluster_sync();\n  if (a.splits > 1) cluster_arrive();\n",
        "clusters",
        "ends without cluster_sync after it read another block's shared memory|waits at cluster_arrive",
    ),
    Mutation(
        "a barrier that some threads skip",
        "posterior.cuh",
        "      if (C::M == 1 || !bounded || !*shared.flag) return bounded;",
        "      if (threadIdx.x % 2 == 0) return bounded;\n      __syncthreads();",
        "no clusters",
        "waits at __syncthreads",
    ),
    Mutation(
        "no step to the next image",
        "points.cuh",
        "    offset += wraps ? offset_of_wrap : offset_of_step;",
        "    offset += offset_of_step;",
        "no clusters",
        WRONG,
    ),
    Mutation(
        "one component's partial sums for all",
        "finish.cuh",
        "(a.partials)[(split * kRows + row) * size + i]",
        "(a.partials)[(split * kRows + row) * size + i % a.channels]",
        "streaming",
        WRONG,
    ),
    Mutation(
        "no merge of a thread's splits",
        "finish.cuh",
        "sums[row] += static_cast<const S*>(a.partials)",
        "sums[row] = static_cast<const S*>(a.partials)",
        "streaming",
        WRONG,
        (MANY_SPLITS,),
    ),
    Mutation(
        "no merge of the threads' splits",
        "finish.cuh",
        "  for (int row = 0; row < kRows; ++row) sums[row] = warp_sum(sums[row], 1);\n",
        "",
        "streaming",
        WRONG,
    ),
    Mutation(
        "no merge of the warps",
        "reduce.cuh",
        "sum = first == 0 ? value : sum + value;",
        "sum = value;",
        "no clusters",
        WRONG,
    ),
    Mutation(
        "no merge of the cluster's blocks",
        "reduce.cuh",
        "total += rank < size ? part : 0;",
        "total = rank < size ? part : total;",
        "clusters",
        WRONG,
    ),
    Mutation(
        "copies that are not waited for",
        "kernels.cuh",
        "wait_for_copies<kResidentChunksAhead>",
        "wait_for_copies<kResidentChunksAhead + 1>",
        "no clusters",
        "ends before its copies to shared memory",
    ),
    Mutation(
        "points beyond the end",
        "points.cuh",
        "    return point() < length() ? static_cast<int>((length() - 1 - point()) / step()) + 1 : 0;",
        "    return iterations();",
        "no clusters",
        WRONG + "|" + OUT_OF_BOUNDS,
    ),
    Mutation(
        "shared memory for a chunk less",
        "launch.h",
        "const int64_t bytes = slots * plan.threads",
        "const int64_t bytes = (slots - 1) * plan.threads",
        "no clusters",
        OUT_OF_BOUNDS + "|for an address in the block's shared memory",
    ),
    Mutation(
        "weights of points that do not exist",
        "kernels.cuh",
        "      if (v >= count) factor = 0;\n",
        "",
        "streaming",
        WRONG,
    ),
    Mutation(
        "another component for the widest one",
        "coefficients.cuh",
        "__shfl_sync(0xffffffffu, value, m, C::M);",
        "__shfl_sync(0xffffffffu, value, (m + 1) % C::M, C::M);",
        "streaming",
        WRONG,
    ),
    Mutation(
        "odds that are taken for bounded",
        "posterior.cuh",
        "            *shared.flag = 1;",
        "            *shared.flag = 0;",
        "streaming",
        WRONG,
        (Case(WHOLE, data="equal"),),
    ),
    Mutation(
        "the first chunk's place for those loaded with it",
        "kernels.cuh",
        "visit(walk.at(places[i]), x[i]",
        "visit(walk.at(places[0]), x[i]",
        "streaming",
        WRONG,
    ),
    Mutation(
        "no barrier before the points' sums are merged",
        "joint.cuh",
        "  __syncthreads();\n  for (int number",
        "  for (int number",
        "streaming",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "no merge of the warps' channels",
        "joint.cuh",
        "totals[m] += block.total(number, m, part);",
        "totals[m] = block.total(number, m, part);",
        "streaming",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "no merge of what is flushed",
        "joint.cuh",
        "block.total(block.number(k), m, block.warp) += ",
        "block.total(block.number(k), m, block.warp) = ",
        "streaming",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "weights of points beyond the last one",
        "joint.cuh",
        "if (m < a.components && block.exists(number))",
        "if (m < a.components)",
        "streaming",
        WRONG + "|" + OUT_OF_BOUNDS,
        JOINT_CASES,
    ),
    Mutation(
        "moments of points beyond the last one",
        "joint.cuh",
        "block.exists(number) ? p[m] : S(0);",
        "p[m];",
        "no clusters",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "one tile's moments for all",
        "joint.cuh",
        "sum = first ? value : sum + value;",
        "sum = value;",
        "no clusters",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "no merge of the parts of a tile's points",
        "joint.cuh",
        "sum += staged(of * groups",
        "sum = staged(of * groups",
        "no clusters",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "elements that have not changed their places yet",
        "joint.cuh",
        "= static_cast<S>(column[i * block.stride]);\n        __syncwarp();",
        "= static_cast<S>(column[i * block.stride]);",
        "no clusters",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "no barrier before the next tile",
        "joint.cuh",
        "    __syncthreads();\n  }\n\n private:",
        "  }\n\n private:",
        "no clusters",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "no barrier before the gradients of the weights are used",
        "joint.cuh",
        "    finish(totals, number);\n  }\n  __syncthreads();",
        "    finish(totals, number);\n  }",
        "no clusters",
        WRONG,
        JOINT_CASES,
    ),
    Mutation(
        "one word of the mask for all lanes",
        "joint.cuh",
        "      if (shift && bits >> (32 - shift)) atomic_or(word + 1, bits >> (32 - shift));\n",
        "",
        "streaming",
        WRONG + "|" + OUT_OF_BOUNDS,
        JOINT_CASES,
    ),
    Mutation(
        "weights of the component before",
        "posterior.cuh",
        "static_cast<const S*>(a.posterior) + (m < a.components ? m : 0) * a.points() + point;",
        "static_cast<const S*>(a.posterior) + (m ? m - 1 : 0) * a.points() + point;",
        "streaming",
        WRONG,
        JOINT_CASES,
    ),
]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The library of the kernels as they are, its sources, and its objects by the name of their source."""
    folder = tmp_path_factory.mktemp("few")
    sources = folder / "few.cu", folder / "few_joint.cu"
    for source, code in zip(sources, (FEW, JOINT), strict=True):
        source.write_text(code)
    library = build("few", [CSRC / "cuda" / "compound_norm.cu", *sources])
    return library, sources, {path.name.removesuffix(".o"): path for path in library.parent.glob("*.o")}


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_as_they_are_pass(few, device):
    cases = (*CASES, *JOINT_CASES)
    assert failures(cases, run_table(few[0], cases, DEVICES[device])) == []


def found_in(mutation, few, csrc):
    """What is wrong with the table when `csrc`, the folder of the sources then, has been mutated."""
    _, (source, joint), objects = few
    shutil.copytree(CSRC, csrc)
    file = csrc / "cuda" / mutation.file
    text = file.read_text()
    assert text.count(mutation.text) == 1
    file.write_text(text.replace(mutation.text, mutation.replacement))

    # What the mutation does not touch is linked as it is.
    host = csrc / "cuda" / "compound_norm.cu"
    source = joint if mutation.cases is JOINT_CASES else source
    changed = {"finish.cuh": [host], "launch.h": [host, source]}.get(mutation.file, [source])
    unchanged = [path for name, path in objects.items() if name not in {path.name for path in changed}]
    mutant = build(f"mutants/{csrc.name}", changed, csrc, unchanged)
    return failures(mutation.cases, run_table(mutant, mutation.cases, DEVICES[mutation.device]))


@pytest.fixture(scope="module")
def mutants(request, few, tmp_path_factory):
    """What is found in each mutation that is asked for; a few at a time, as compiler and table have one thread each."""
    folder = tmp_path_factory.mktemp("mutants")
    tests = (getattr(item, "callspec", None) for item in request.session.items)
    asked = {test.params["mutation"] for test in tests if test and "mutation" in test.params}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            mutation: pool.submit(found_in, mutation, few, folder / f"mutant_{i}")
            for i, mutation in enumerate(MUTATIONS)
            if mutation in asked
        }


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_the_table_fails(mutants, mutation):
    found = mutants[mutation].result()
    assert re.search(mutation.sign, "\n".join(found)), found
