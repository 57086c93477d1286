"""The emulated device itself, on small kernels: what it runs, and every kind of mistake that it must catch."""

import json
import re

import pytest

from python_tests.emulation.build import HERE, build, run_python

RUN = """
import ctypes, json, os, sys
library, name, *launch, seeds = sys.argv[1:]
blocks, threads, cluster, shared = map(int, launch)
toys = ctypes.CDLL(library)
toys.run_toy.restype = ctypes.c_char_p
results = []
for seed in range(int(seeds)):
    os.environ["CBN_EMULATION_SEED"] = str(seed)
    out = (ctypes.c_double * max(1, blocks * threads))()
    results.append((toys.run_toy(name.encode(), out, blocks, threads, cluster, shared).decode(), list(out)))
print(json.dumps(results))
"""
BLOCKS, THREADS = 4, 96


@pytest.fixture(scope="module")
def toys():
    return build("toys", [HERE / "toys.cu"])


def process_of(toys, name, cluster=1, shared=8 * THREADS, blocks=BLOCKS, threads=THREADS, seeds=3, device="4,65536,8"):
    arguments = (name, blocks, threads, cluster, shared, seeds)
    return run_python(RUN, str(toys), *map(str, arguments), CBN_EMULATED_DEVICE=device)


def run(*arguments, **options):
    """For every seed the message of the error, or "", and the results [blocks * threads]."""
    process = process_of(*arguments, **options)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    ("name", "cluster", "expected"),
    [
        ("block_sum", 1, THREADS * (THREADS - 1) / 2),
        ("block_sum", 4, THREADS * (THREADS - 1) / 2),
        ("cluster_sum", 1, 1),
        ("cluster_sum", 4, 1 + 2 + 3 + 4),
        ("cluster_sum_in_halves", 4, 1 + 2 + 3 + 4),
        ("warp_sum", 2, 3 * 32 * 31 / 2),
        ("neighbour", 1, 3),
        ("ballot", 1, sum(1 << lane for lane in range(0, 32, 3))),
    ],
)
def test_correct_kernels_run(toys, name, cluster, expected):
    assert run(toys, name, cluster) == 3 * [["", [expected] * (BLOCKS * THREADS)]]


@pytest.mark.parametrize("cluster", [1, 2])
def test_blocks_and_their_threads_run_in_random_order(toys, cluster):
    orders = [order for _, order in run(toys, "order", cluster)]
    together = cluster * THREADS
    for order in orders:
        assert sorted(order) == list(range(BLOCKS * THREADS))
        # Clusters run one after the other, the threads of one mixed.
        clusters = [order[first : first + together] for first in range(0, BLOCKS * THREADS, together)]
        assert all(max(ranks) - min(ranks) == together - 1 for ranks in clusters)
        assert all(sorted(ranks) != ranks for ranks in clusters)
    assert orders[0] != orders[1] and orders == [order for _, order in run(toys, "order", cluster)]
    first_blocks = {order.index(0) // together for _, order in run(toys, "order", cluster, seeds=20)}
    assert first_blocks == set(range(BLOCKS // cluster))


@pytest.mark.parametrize(
    ("name", "cluster"),
    [("block_sum_without_second_barrier", 1), ("block_sum_without_barriers", 1), ("cluster_sum_without_barrier", 2)],
)
def test_a_missing_barrier_gives_wrong_results(toys, name, cluster):
    right = run(toys, name.split("_without_")[0], cluster)[0][1]
    for error, wrong in run(toys, name, cluster):
        assert error == "" and wrong != right


def test_copies_are_there_when_they_are_waited_for(toys):
    """And, at random, before that: their place must not be in use."""
    expected = BLOCKS * [float(thread) for thread in range(THREADS)]
    shared = 16 * THREADS
    for name in ("copies_all", "copies_one_pending"):
        assert run(toys, name, shared=shared) == 3 * [["", expected]]
    for name in ("copies_two_pending", "copies_without_wait"):
        for error, results in run(toys, name, shared=shared):
            missing = [result != wanted for result, wanted in zip(results, expected, strict=True)]
            assert error == "" and 0.3 < sum(missing) / len(missing) < 0.7


@pytest.mark.parametrize(
    ("name", "cluster", "message"),
    [
        ("divergent_barrier", 1, r"thread \d+ .* waits at __syncthreads .*thread \d+ of .* not reach: it has ended"),
        ("two_barriers", 1, r"waits at __syncthreads \(.*:\d+\), but .* at __syncthreads \(.*:\d+\)"),
        ("two_kinds_of_barrier", 2, r"waits at cluster_sync \(.*\), but .* at cluster_sync"),
        ("missing_lane", 1, r"waits at __shfl_xor_sync .*, which thread 17 .* does not reach: it has ended"),
        ("lane_at_another_shuffle", 1, r"waits at __shfl_xor_sync \(.*\), but .* at __shfl_xor_sync"),
        ("lane_at_barrier", 1, r"waits at .*, which thread .* does not reach: it waits at "),
        ("part_of_warp", 1, r"__shfl_xor_sync \(.*\) with mask ff"),
        ("no_such_neighbour", 1, r"__shfl_sync with lane 8 of 8"),
        ("no_such_block", 2, r"cluster_shared of block 2 in a cluster of 2"),
        ("not_shared", 2, r"takes 0x\w+ for an address in the block's shared memory"),
        ("copies_elsewhere", 1, r"takes 0x\w+ for an address in the block's shared memory"),
        ("copies_without_end", 1, r"ends before its copies to shared memory"),
        ("cluster_sum_without_last_barrier", 2, r"ends without cluster_sync after it read another block's"),
        ("cluster_sum_in_halves_without_wait", 2, r"ends without cluster_wait after cluster_arrive"),
        ("cluster_sum_in_halves_without_arrival", 2, r"waits at cluster_wait \(.*\) without cluster_arrive before"),
        ("cluster_sum_in_halves_without_order", 2, r"ends without cluster_sync after it read another block's"),
        ("misaligned_pack", 1, r"misaligned access of 16 bytes"),
        ("misaligned_load", 1, r"misaligned access of 16 bytes"),
        ("misaligned_copy", 1, r"misaligned access of 16 bytes"),
        ("failed_check", 1, r"thread 17 of block \d+ fails a check: expected another thread"),
    ],
)
def test_mistakes_end_the_launch(toys, name, cluster, message):
    results = run(toys, name, cluster)
    for seed, (error, _) in enumerate(results):
        assert re.search(message, error), error
        assert f"toys::{name.split('_without_')[0]}" in error and f"CBN_EMULATION_SEED={seed}]" in error


def test_a_block_that_has_ended_cannot_be_read(toys):
    """Whichever of the two blocks is faster."""
    errors = [error for error, _ in run(toys, "read_without_barrier", 2, blocks=2, threads=1, seeds=10)]
    assert all("ends without cluster_sync" in error or "of a block that has ended" in error for error in errors)
    assert len({error.split(" [")[0] for error in errors}) == 2


def test_a_failed_launch_leaves_nothing_behind(toys):
    """Its threads are abandoned where they are; hundreds of such launches, and a good one after them, run."""
    assert len(run(toys, "divergent_barrier", seeds=300)) == 300
    results = run(toys, "mistake_and_block_sum", seeds=50)
    assert all(result == results[0] for result in results) and results[0][0] == ""


@pytest.mark.parametrize(
    "name", ["shared_out_of_bounds", "global_out_of_bounds", "cluster_out_of_bounds", "copies_out_of_bounds"]
)
def test_address_sanitizer_finds_what_is_out_of_bounds(toys, name):
    process = process_of(toys, name, cluster=2)
    assert process.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in process.stderr and f"toys::{name}" in process.stderr


def test_misaligned_vectors_of_shared_memory_are_found(toys):
    process = process_of(toys, "misaligned_shared")
    assert process.returncode != 0 and "misaligned address" in process.stderr


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"blocks": 0}, "blocks"),
        ({"threads": 0}, "1 to 1024 threads"),
        ({"threads": 1025}, "1 to 1024 threads"),
        ({"cluster": 3}, "divide the number of blocks"),
        ({"cluster": 16, "blocks": 16}, "clusters of 1 to 8"),
        ({"cluster": 2, "device": "4,65536,1"}, "clusters of 1 to 1"),
        ({"shared": 65537}, "65536 bytes"),
        ({"device": "4,100,8"}, "100 bytes"),
        ({"device": "4,65536"}, "CBN_EMULATED_DEVICE=multiprocessors,shared_memory,cluster, got 4,65536"),
        ({"threads": 40, "name": "warp_sum"}, "in a warp of 8 threads"),
    ],
)
def test_launches_beyond_the_limits_fail(toys, launch, message):
    options = {"name": "block_sum", **launch}
    for error, _ in run(toys, **options):
        assert message in error
