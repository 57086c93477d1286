"""The case table of all backends on the GPU, on every path of the kernels, and the shapes of real networks."""

import pytest
import torch

from python_tests.support.cases import CASES, Case, Results, assert_results, expected, run

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_path_matches_oracle(case, path):
    assert_results(run(case, "native", "cuda"), expected(case), case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case):
    assert_results(run(case, "native", "cuda"), run(case, "reference", "cuda"), case, storage_roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("components", range(1, 17))
def test_every_number_of_components(components, layout, dtype, path):
    """With sizes that no vector, warp or segment of channels divides."""
    case = Case((3, 20, 5, 7), components, dtype=dtype, layout=layout)
    assert_results(run(case, "native", "cuda"), expected(case), case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [
        (128, 16, 32, 32),
        (128, 64, 8, 8),
        (16, 64, 112, 112),
        (16, 256, 56, 56),
        (16, 512, 28, 28),
        (64, 1024, 14, 14),
        (64, 2048, 7, 7),
        (1, 3, 1031, 1033),
        (100003, 70),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_of_networks(shape, dtype, layout):
    """The data are drawn on the GPU, and the oracle runs there in float64: the host would take a minute for each."""
    case = Case(shape, dtype=dtype, layout=layout, activation="relu", residual=True, drawn_on="cuda")
    results = Results(*(None if t is None else t.cuda() for t in run(case, "native", "cuda")))
    assert_results(results, expected.__wrapped__(case, "cuda"), case)
