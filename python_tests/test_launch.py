"""Launch planning (csrc/cuda/launch.h) by itself: every element is covered once and every limit kept."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cbn_ext import _host

WARP = 32
CHUNKS_AHEAD = 3  # of the ring in the streaming path
MOST_ELEMENTS = 128  # that a thread adds up in single precision in the streaming path

H200 = _host.Device(multiprocessors=132, shared_memory=232448, cluster=8)
A100 = _host.Device(multiprocessors=108, shared_memory=166912, cluster=1)
A10 = _host.Device(multiprocessors=72, shared_memory=101376, cluster=1)
STREAMING = _host.Device(multiprocessors=132, shared_memory=232448, cluster=0)
DEVICES = {"H200": H200, "A100": A100, "A10": A10, "streaming": STREAMING}


def vector(channels_last: bool, element_size: int, components: int) -> int:
    """Elements of a chunk as the kernels are compiled: 16 bytes, fewer where coefficients fill the registers."""
    words = 2 if element_size == 8 else 1
    many = components * words >= 16
    if channels_last:
        return min(4, 1 if many else 16 // (components * words), 16 // element_size)
    return min(2 // words if many else 8, 16 // element_size)


def extent(channels, points, channels_last, element_size=4, components=4, tensors=1):
    v = vector(channels_last, element_size, components)
    statistic_size = 8 if element_size == 8 else 4
    coefficients = (v if channels_last else 1) * components * statistic_size // 4
    threads = 512 if coefficients <= 4 else 256
    arguments = {
        "channels": channels,
        "points": points,
        "channels_last": channels_last,
        "element_size": element_size,
        "statistic_size": statistic_size,
        "components": components,
        "vector": v,
        "most_threads": threads,
        "tensors": tensors,
    }
    return arguments, _host.Extent(**arguments)


def coverage(begin: int, end: int, plan, arguments) -> list[range]:
    """The points that each iteration of a block of threads takes."""
    rows = plan.threads // plan.lanes
    step = rows if arguments["channels_last"] else plan.threads * arguments["vector"]
    return [range(start, min(start + step, end)) for start in range(begin, end, step)]


EXTENTS = st.fixed_dictionaries(
    {
        "channels": st.one_of(st.integers(1, 300), st.sampled_from([512, 1000, 2048, 70000])),
        "points": st.one_of(st.integers(1, 5000), st.integers(1, 2**22), st.sampled_from([2**31, 2**33 + 7])),
        "channels_last": st.booleans(),
        "element_size": st.sampled_from([2, 4, 8]),
        "components": st.sampled_from([1, 2, 4, 8, 16]),
        "tensors": st.sampled_from([1, 2]),
    }
)


@pytest.mark.parametrize("planning", [_host.plan_reduction, _host.plan_streaming], ids=["reduction", "streaming"])
@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=700)
@given(case=EXTENTS)
def test_every_limit_is_kept_and_every_element_covered_once(planning, device, case):
    assume(case["channels"] * case["points"] < 2**40)  # more than any memory holds
    limits = {"H200": (232448, 8), "A100": (166912, 1), "A10": (101376, 1), "streaming": (232448, 1)}
    shared_memory, cluster = limits[device]
    arguments, asked = extent(**case)
    plan = planning(asked, DEVICES[device])
    channels_last, v = arguments["channels_last"], arguments["vector"]

    assert plan.threads % WARP == 0 and 2 * WARP <= plan.threads <= arguments["most_threads"]
    assert plan.shared <= shared_memory
    assert 1 <= plan.blocks == plan.channel_blocks * plan.splits < 2**31
    assert not (plan.resident and device == "streaming")
    if plan.resident:
        assert plan.splits in (1, 2, 4, 8) and plan.splits <= cluster

    # Channels: blocks of K, the last one perhaps not full; lanes are whole in a warp and in the bytes of the mask.
    assert plan.channels_of_block == (plan.lanes * v if channels_last else 1)
    assert (plan.channel_blocks - 1) * plan.channels_of_block < arguments["channels"]
    assert plan.channel_blocks * plan.channels_of_block >= arguments["channels"]
    assert plan.lanes & (plan.lanes - 1) == 0 and plan.lanes <= WARP
    if channels_last:
        assert plan.lanes * v % 8 == 0
    else:
        assert plan.lanes == 1

    # Points: splits follow each other, start at whole warps, and cover all.
    assert plan.splits * plan.points_of_split >= arguments["points"]
    if not plan.resident:
        assert (plan.splits - 1) * plan.points_of_split < arguments["points"]
    if not channels_last:
        assert plan.points_of_split % (WARP * v) == 0
    last = min(plan.splits - 1, (arguments["points"] - 1) // plan.points_of_split)
    for split in {0, last}:
        begin = split * plan.points_of_split
        end = min(begin + plan.points_of_split, arguments["points"])
        taken = coverage(begin, end, plan, arguments)
        assert taken[0].start == begin and taken[-1].stop == end
        assert all(one.stop == other.start for one, other in itertools.pairwise(taken))
        assert len(taken) <= plan.slots or not plan.resident

    # Shared memory holds the chunks after everything else.
    assert plan.slots == CHUNKS_AHEAD + 1 or plan.resident
    chunks = plan.slots * plan.threads * v * arguments["element_size"] * arguments["tensors"]
    items = arguments["components"] * plan.channels_of_block
    assert plan.shared >= chunks + items * (6 * 8 + 12 * arguments["statistic_size"])

    # Single precision adds up few elements.
    of_thread = math.ceil(plan.points_of_split / (plan.threads / plan.lanes)) * (v if channels_last else 1)
    if not plan.resident:
        assert of_thread <= MOST_ELEMENTS + (WARP * v if not channels_last else v)


@pytest.mark.parametrize(
    ("channels", "points", "tensors", "resident", "splits"),
    [
        # ResNet-32 on CIFAR at batch 128: one cluster for each channel, about a block for each multiprocessor.
        (16, 128 * 32 * 32, 1, True, 8),
        (32, 128 * 16 * 16, 1, True, 4),
        (64, 128 * 8 * 8, 1, True, 2),
        # ResNet-50 at batch 64
        (64, 64 * 56 * 56, 1, True, 8),
        (256, 64 * 56 * 56, 1, True, 8),
        (256, 64 * 56 * 56, 2, True, 8),
        (512, 64 * 28 * 28, 1, True, 2),
        (1024, 64 * 14 * 14, 1, True, 1),
        (2048, 64 * 7 * 7, 2, True, 1),
        # larger than a cluster's shared memory
        (64, 64 * 112 * 112, 1, False, None),
        (256, 256 * 56 * 56, 2, False, None),
    ],
)
def test_where_a_channel_stays_on_chip(channels, points, tensors, resident, splits):
    """float32 and contiguous; by hand: points x 4 bytes x tensors over 8 blocks of 227 KiB."""
    _, asked = extent(channels, points, False, tensors=tensors)
    plan = _host.plan_reduction(asked, H200)
    assert plan.resident == resident
    if resident:
        assert plan.splits == splits
    else:
        assert plan.blocks >= 8 * 132  # enough to keep every multiprocessor busy to the end


def test_no_cluster_without_clusters():
    _, asked = extent(16, 128 * 32 * 32, False)
    assert not _host.plan_reduction(asked, A100).resident
    _, asked = extent(1024, 64 * 14 * 14, False)
    plan = _host.plan_reduction(asked, A100)
    assert plan.resident and plan.splits == 1
