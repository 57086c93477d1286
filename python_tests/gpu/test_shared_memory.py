"""Launches that ask for much shared memory: from two threads, in a graph, in clusters on a busy device."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from python_tests.gpu.test_execution import assert_same_bits
from python_tests.support.cases import Case, backward_arguments, forward_arguments

OPS = torch.ops.cbn_ext
STEP = 16 << 10


def case_of(steps, layout="contiguous", cluster=1):
    """Four clusters, each block of which keeps so many steps of 16 KB: float32 of x and of the residual or gradient.

    A step is 2048 points of a channel, in channels_last 128 points of 16 channels. Three steps are more than the 48 KB
    that a kernel may have without asking.
    """
    channels, points = (64, 128) if layout == "channels_last" else (4, 2048)
    shape = (cluster, channels, steps, points)
    return Case(shape, layout=layout, activation="relu", residual=True, drawn_on="cuda")


def most_steps():
    """As many as a block of this device can keep; its sums and coefficients take less than 12 KB beside them."""
    return (torch.cuda.get_device_properties(0).shared_memory_per_block_optin - (12 << 10)) // STEP


def both_passes(case):
    """A function that calls the operators on the case's data and gives all their results."""
    forward, backward = forward_arguments(case, "cuda"), backward_arguments(case, "cuda")
    return lambda: (*OPS.forward(*forward), *OPS.backward(*backward))


def test_two_threads_with_different_shapes(limit_cluster):
    """What a thread asks of a kernel holds for both: neither takes from the other what its launch needs."""
    limit_cluster(1)
    calls = [both_passes(case_of(steps)) for steps in (4, 5)]
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    start = threading.Barrier(len(calls))

    def repeat(call):
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            return [call() for _ in range(1000)]

    with ThreadPoolExecutor(len(calls)) as pool:
        results = list(pool.map(repeat, calls))
    torch.cuda.synchronize()
    for of_thread, wanted in zip(results, expected, strict=True):
        for actual in of_thread:
            assert_same_bits(actual, wanted)


def test_graph_of_rising_and_falling_sizes(limit_cluster):
    """A replay has the shared memory that its launches were captured with, whatever was launched since."""
    limit_cluster(1)
    calls = [both_passes(case_of(steps)) for steps in (2, 4, most_steps(), 4, 2)]
    smaller = both_passes(case_of(3))
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    smaller()
    for _ in range(3):
        for tensor in (t for of_call in results for t in of_call):
            tensor.zero_()
        graph.replay()
        for actual, wanted in zip(results, expected, strict=True):
            assert_same_bits(actual, wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_full_blocks_on_a_busy_device(cluster, layout, limit_cluster):
    """The blocks of a cluster find room only together, and start late; sums are added in the same order."""
    limit_cluster(cluster)
    call = both_passes(case_of(most_steps(), layout, cluster))
    expected = call()
    matrix = torch.randn(2048, 2048, device="cuda")
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    for _ in range(1000):
        with torch.cuda.stream(other):
            matrix @ matrix  # about as long as the rest of the loop
        for a, e in zip(call(), expected, strict=True):
            differs |= (a != e).any()
    assert not differs
