"""Launch planning (csrc/cuda/launch.h) by itself: every element is covered once and every limit kept."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cbn_ext import _host

WARP = 32
MOST_POINTS = 128  # that a thread adds up in single precision in the streaming path
MOST_OF_INPUT = 0.025  # the memory of the sums, of the input's, in the streaming path
LITTLE = 16384  # bytes that they may always have

# Multiprocessors, bytes of shared memory of a block, blocks of the largest cluster, bytes of the cache.
LIMITS = {
    "H200": (132, 232448, 8, 60 << 20),
    "A100": (108, 166912, 1, 40 << 20),
    "A10": (72, 101376, 1, 6 << 20),
}
DEVICES = {name: _host.Device(*limits) for name, limits in LIMITS.items()}
H200, A100 = DEVICES["H200"], DEVICES["A100"]
USUAL = _host.Tuning()
TUNINGS = {"usual": {}, "other": {"cluster": 2, "blocks": 16, "threads": 128}, "streaming": {"cluster": 0}}
PASSES = {"resident": _host.plan_resident, "reduction": _host.plan_reduction, "map": _host.plan_map}

# ResNets on CIFAR at batch 128, and ResNet-50 on ImageNet at two batches.
NETWORK_SHAPES = [(128, 32, 16, 16), (128, 16, 32, 32), (128, 64, 8, 8)] + [
    (images, channels, size, size)
    for images in (64, 256)
    for channels, size in ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
]


def vector(channels_last: bool, element_size: int, components: int) -> int:
    """Elements of a chunk as the kernels are compiled: 16 bytes, fewer where coefficients fill the registers."""
    words = 2 if element_size == 8 else 1
    if channels_last:
        most = 4 if components * words <= 2 else 2 if components * words <= 8 else 1
    else:
        most = 8 if components * words < 16 else 2 // words
    return min(most, 16 // element_size)


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


@pytest.mark.parametrize("planned", PASSES)
@settings(max_examples=2000)
@given(device=st.sampled_from(list(DEVICES)), tuning=st.sampled_from(list(TUNINGS)), case=EXTENTS)
def test_every_limit_is_kept_and_every_element_covered_once(planned, device, tuning, case):
    assume(case["channels"] * case["points"] < 2**40)  # more than any memory holds
    multiprocessors, shared_memory, cluster, _ = LIMITS[device]
    chosen = TUNINGS[tuning]
    arguments, asked = extent(**case)
    plan = PASSES[planned](asked, DEVICES[device], _host.Tuning(**chosen))
    if plan is None:
        assert planned == "resident"
        return
    channels_last, v = arguments["channels_last"], arguments["vector"]

    most_threads = min(arguments["most_threads"], chosen.get("threads", 512) if plan.resident else 256)
    assert plan.threads % WARP == 0 and 2 * WARP <= plan.threads <= most_threads
    assert plan.shared <= shared_memory
    assert 1 <= plan.blocks == plan.channel_blocks * plan.splits < 2**31
    assert plan.resident == (planned == "resident")
    if plan.resident:
        assert plan.splits in (1, 2, 4, 8) and plan.splits <= min(cluster, chosen.get("cluster", 8))

    # Channels: blocks of K, the last one perhaps not full; columns are whole in a warp and in the bytes of the mask.
    assert plan.channels_of_block == (plan.columns * v if channels_last else 1)
    assert (plan.channel_blocks - 1) * plan.channels_of_block < arguments["channels"]
    assert plan.channel_blocks * plan.channels_of_block >= arguments["channels"]
    assert plan.columns & (plan.columns - 1) == 0 and plan.columns <= WARP
    if channels_last:
        assert plan.columns * v % 8 == 0
    else:
        assert plan.columns == 1

    # Points: splits follow each other, start at whole warps, and cover all.
    assert plan.splits * plan.points_of_split >= arguments["points"]
    if not plan.resident:
        assert (plan.splits - 1) * plan.points_of_split < arguments["points"]
    if not channels_last:
        assert plan.points_of_split % (WARP * v) == 0
    step = plan.threads // plan.columns if channels_last else plan.threads * v
    assert not plan.resident or plan.slots * step >= min(plan.points_of_split, arguments["points"])

    # Shared memory holds the chunks after everything else.
    assert plan.resident or plan.slots == 0
    chunks = plan.slots * plan.threads * v * arguments["element_size"] * arguments["tensors"]
    items = arguments["components"] * plan.channels_of_block
    assert plan.shared >= chunks + items * (6 * 8 + 12 * arguments["statistic_size"])

    if planned != "reduction":
        return
    # Sums take little memory, and single precision adds up few points where that allows it.
    input_bytes = arguments["channels"] * arguments["points"] * arguments["element_size"]
    of_split = 3 * arguments["components"] * arguments["channels"] * arguments["statistic_size"]
    assert _host.bytes_of_sums(asked, plan.splits) == of_split * plan.splits
    most = max(MOST_OF_INPUT * input_bytes, LITTLE)
    assert plan.splits == 1 or of_split * plan.splits <= most
    rows = plan.threads // plan.columns
    of_thread = math.ceil(plan.points_of_split / rows)
    # Splits are limited by memory, but for rounding; or rounding takes a few more points, a quarter at most.
    limited = of_split * (2 * plan.splits + multiprocessors) > most
    assert limited or of_thread <= 1.25 * MOST_POINTS + (0 if channels_last else WARP * v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("element_size", [2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("components", [1, 2, 4, 8, 16])
def test_sums_take_little_memory_at_the_sizes_of_networks(device, element_size, channels_last, components):
    """And the multiprocessors have work: there are as many blocks, where that many would have enough to do."""
    for images, channels, height, width in NETWORK_SHAPES:
        points = images * height * width
        _, asked = extent(channels, points, channels_last, element_size, components)
        plan = _host.plan_reduction(asked, DEVICES[device], USUAL)
        share = _host.bytes_of_sums(asked, plan.splits) / (channels * points * element_size)
        # The statistics themselves, in one split, are more only for 16 components of 16-bit inputs.
        assert share <= MOST_OF_INPUT or (plan.splits == 1 and components == 16 and element_size == 2)
        if components <= 4:
            assert plan.blocks >= LIMITS[device][0] / 2 or channels * points <= 2**21


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("blocks", [4, 16])
def test_a_map_has_the_blocks_it_is_asked_for(blocks, channels_last):
    """However many points a thread then takes: 256 x 256 x 56 x 56 float32 on 132 multiprocessors."""
    _, asked = extent(256, 256 * 56 * 56, channels_last, tensors=2)
    plan = _host.plan_map(asked, H200, _host.Tuning(blocks=blocks))
    assert 0.9 * blocks * 132 <= plan.blocks <= blocks * 132
    assert math.ceil(plan.points_of_split / (plan.threads // plan.columns)) > 2 * MOST_POINTS or blocks == 16


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
    plan = _host.plan_resident(asked, H200, USUAL)
    assert (plan is not None) == resident
    assert plan is None or plan.splits == splits


def test_no_cluster_without_clusters():
    _, asked = extent(16, 128 * 32 * 32, False)
    assert _host.plan_resident(asked, A100, USUAL) is None
    _, asked = extent(1024, 64 * 14 * 14, False)
    assert _host.plan_resident(asked, A100, USUAL).splits == 1


POINT_LIMITS = {"threads": 512, "points_of_thread": 4, "side": 32, "shared": 71680}  # of four components, contiguous


@settings(max_examples=2000)
@given(device=st.sampled_from(list(DEVICES)), case=EXTENTS, points=st.sampled_from([1, 2, 4, 8]))
def test_the_points_of_a_thread_are_as_many_as_suit(device, case, points):
    """Whole blocks for all multiprocessors, whose inputs take half of the cache at most, or one point for a thread."""
    multiprocessors, shared_memory, _, cache = LIMITS[device]
    _, asked = extent(**case)
    limits = _host.PointLimits(**POINT_LIMITS | {"points_of_thread": points})
    chosen = _host.points_of_thread(asked, limits, DEVICES[device])

    def suits(number):
        tile = 32 * number * case["channels"] * case["element_size"] * case["tensors"]
        return math.ceil(case["points"] / (32 * number)) >= multiprocessors and 2 * tile * multiprocessors <= cache

    assert chosen == max(n for n in (1, 2, 4, 8) if n <= points and (n == 1 or suits(n)))

    splits = _host.splits_of_moments(asked, limits, DEVICES[device], USUAL)
    tiles = math.ceil(case["points"] / (32 * chosen))
    assert 0 <= splits <= min(tiles, multiprocessors)
    input_bytes = case["channels"] * case["points"] * case["element_size"]
    assert _host.bytes_of_sums(asked, splits) <= max(MOST_OF_INPUT * input_bytes, LITTLE)
    assert splits == 0 or 2 * splits >= min(tiles, multiprocessors)
    assert splits == 0 or POINT_LIMITS["shared"] <= shared_memory


@pytest.mark.parametrize(
    ("channels", "points", "of_thread", "splits"),
    [
        # ResNet-32 on CIFAR at batch 128, ResNet-50 at batch 64; a tile is 32 points for each of a thread's.
        (16, 128 * 32 * 32, 4, 132),
        (64, 128 * 8 * 8, 1, 0),  # 256 tiles, but sums of 3 KiB, of which 52 KiB are a fortieth of the input
        (64, 64 * 56 * 56, 4, 132),
        (256, 64 * 56 * 56, 4, 132),
        # 132 tiles of 128 points take 33 MiB; a fortieth of the input is 104 times 24 KiB
        (512, 64 * 28 * 28, 2, 104),
        (2048, 64 * 7 * 7, 1, 0),
    ],
)
def test_where_weights_and_moments_are_one_pass(channels, points, of_thread, splits):
    _, asked = extent(channels, points, False)
    limits = _host.PointLimits(**POINT_LIMITS)
    assert _host.points_of_thread(asked, limits, H200) == of_thread
    assert _host.splits_of_moments(asked, limits, H200, USUAL) == splits
    too_large = _host.PointLimits(**POINT_LIMITS | {"shared": 232449})
    assert _host.splits_of_moments(asked, too_large, H200, USUAL) == 0
    assert _host.splits_of_moments(asked, limits, H200, _host.Tuning(cluster=0)) == 0
