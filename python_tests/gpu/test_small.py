"""A few cases for every path of the kernels: what runs under compute-sanitizer, where each kernel takes long."""

import pytest
import torch

from python_tests.support.cases import Case, assert_results, expected, run

FUSED = {"activation": "relu", "residual": True}
CASES = [
    Case((3, 5, 6, 7)),
    Case((3, 5, 6, 7), layout="channels_last"),
    Case((2, 20, 9, 9), 3, dtype=torch.bfloat16, **FUSED),
    Case((2, 20, 9, 9), 8, dtype=torch.float16, layout="channels_last", **FUSED),
    Case((2, 3, 7, 9), 4, "split", **FUSED),
    Case((2, 3, 7, 9), 4, "split", layout="channels_last"),
    Case((2, 3, 7, 9), 2, dtype=torch.float64, activation="relu"),
    Case((2, 6, 40, 41), 1),
    Case((40, 10), 4, training=False, **FUSED),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small(case, path):
    assert_results(run(case, "native", "cuda"), expected(case), case)
