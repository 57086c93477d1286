"""The timer of the CUDA benchmark on a pretended GPU: what is captured, kept, timed and traced."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from bench import graphs
from bench.harness import BACKWARD, BOTH, EVALUATION, FORWARD
from bench.trace import Kernel, listed, short_name, split_replays, summed


@dataclass
class FakeCuda:
    """What happens on the device, in order; every replay takes the time that its graph is given."""

    log: list[str] = field(default_factory=list)
    now: float = 0.0  # ms
    times: dict[int, float] = field(default_factory=dict)
    kernels: list[tuple[str, float]] = field(default_factory=list)


@pytest.fixture
def device(monkeypatch) -> FakeCuda:
    device = FakeCuda()

    class Graph:
        count = 0

        def __init__(self):
            self.number, Graph.count = Graph.count, Graph.count + 1

        def pool(self):
            return f"pool {self.number}"

        def replay(self):
            device.log.append(f"replay {self.number}")
            device.now += device.times[self.number]
            device.kernels.append((f"kernel {self.number}", 6.0))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def synchronize(self):
            device.log.append("synchronize")

        def elapsed_time(self, end):
            return end.at - self.at

    @contextmanager
    def graph(graph, pool=None, stream=None):
        device.log.append(f"capture {graph.number} in {pool} on {stream}")
        yield
        device.log.append("end")

    @contextmanager
    def profile(activities):
        device.kernels.clear()
        profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=events)))
        yield profiler

    def events():
        cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
        found = [(name, time, start, cuda) for start, (name, time) in enumerate(device.kernels)]
        # As the tracer gives them: not in order, and with the host's.
        return [
            SimpleNamespace(
                name=lambda e=e: e[0],
                duration_ns=lambda e=e: e[1] * 1e3,
                start_ns=lambda e=e: e[2],
                device_type=lambda e=e: e[3],
            )
            for e in [*reversed(found), ("cudaGraphLaunch", 5.0, 0, cpu)]
        ]

    def sleep(cycles):
        device.log.append(f"sleep {cycles}")
        device.now += 0.5
        device.kernels.append(("spin_kernel(long)", 500.0))

    for name, value in {
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": graph,
        "Stream": lambda: "stream",
        "set_stream": lambda stream: device.log.append(f"set {stream}"),
        "_sleep": sleep,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "profile", profile)
    return device


class Workload:
    """Says what it does, and when its results die."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def result(self, what: str):
        log = self.log

        class Result:
            def __del__(self):
                log.append(f"free {what}")

        log.append(what)
        return Result()

    def forward(self):
        return self.result(f"y{self.name}")

    def backward(self, output):
        return self.result(f"dx{self.name}")

    def evaluate(self):
        return self.result(f"e{self.name}")


def captured(device: FakeCuda, cold: bool, evaluation: bool = True) -> tuple[graphs.Timer, graphs.Captured]:
    timer = graphs.Timer()
    device.log.clear()
    return timer, timer.capture([Workload(device.log, "1"), Workload(device.log, "2")], cold, evaluation)


def test_the_tracer_is_there_before_the_first_graph(device):
    graphs.Timer()
    assert device.log == ["set stream", "sleep 1"]


def test_cold_steps_keep_what_they_made_until_all_is_captured(device):
    captured(device, cold=True)
    frees = [line for line in device.log if line.startswith("free")]
    assert device.log[: -len(frees)] == [
        *("capture 0 in None on stream", "y1", "y2", "end"),
        *("capture 1 in pool 0 on stream", "dx1", "dx2", "end"),
        *("capture 2 in pool 0 on stream", "e1", "e2", "end"),
    ]
    assert sorted(frees) == [f"free {name}{n}" for name in ("dx", "e", "y") for n in (1, 2)]


def test_hot_steps_leave_their_memory_to_the_next(device):
    captured(device, cold=False)
    assert device.log == [
        *("capture 0 in None on stream", "y1", "free y1", "y2", "free y2", "end"),
        "capture 1 in pool 0 on stream",
        *("y1", "dx1", "free y1", "free dx1", "y2", "dx2", "free y2", "free dx2", "end"),
        *("capture 2 in pool 0 on stream", "e1", "free e1", "e2", "free e2", "end"),
    ]


@pytest.mark.parametrize(("cold", "backward", "both"), [(True, 2000.0, 2500.0), (False, 1500.0, 2000.0)])
def test_times_are_of_one_step(device, cold, backward, both):
    timer, steps = captured(device, cold)
    device.log.clear()
    device.times = {0: 1.0, 1: 4.0, 2: 0.5}  # ms, for two steps
    assert timer.measure(steps) == {FORWARD: 500.0, BACKWARD: backward, BOTH: both, EVALUATION: 250.0}
    # All is queued behind the sleep, which is not timed.
    assert device.log == ["sleep 1000000", "replay 0", "replay 1", "replay 2", "synchronize"]


def test_evaluation_may_be_left_out(device):
    timer, steps = captured(device, True, evaluation=False)
    device.times = {0: 1.0, 1: 4.0}
    assert timer.measure(steps) == {FORWARD: 500.0, BACKWARD: 2000.0, BOTH: 2500.0}


def test_kernels_belong_to_the_replays_they_follow(device):
    timer = graphs.Timer()
    device.times = dict.fromkeys(range(5), 1.0)
    whole = timer.capture([Workload(device.log, "1")] * 2, True)
    training = timer.capture([Workload(device.log, "2")] * 3, True, evaluation=False)
    assert timer.kernels([whole, training]) == [
        {
            FORWARD: [Kernel("kernel 0", 0.5, 3.0)],
            BACKWARD: [Kernel("kernel 1", 0.5, 3.0)],
            EVALUATION: [Kernel("kernel 2", 0.5, 3.0)],
        },
        {FORWARD: [Kernel("kernel 3", 1 / 3, 2.0)], BACKWARD: [Kernel("kernel 4", 1 / 3, 2.0)]},
    ]


def test_a_trace_that_lost_replays_is_an_error(device, monkeypatch):
    timer, steps = captured(device, True)
    device.times = dict.fromkeys(range(3), 1.0)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    with pytest.raises(RuntimeError, match="expected the trace of 3 replays, got that of 0"):
        timer.kernels([steps])


def test_copy_bandwidth_counts_reads_and_writes(device, monkeypatch):
    timer = graphs.Timer()

    class Tensor:
        def copy_(self, source):
            device.now += 0.5

    monkeypatch.setattr(torch, "ones", lambda *shape, **options: Tensor())
    monkeypatch.setattr(torch, "empty_like", lambda tensor: Tensor())
    assert timer.copy_bandwidth(10**9, copies=3) == pytest.approx(2 * 10**9 / 0.5e-3 / 1e9)


def test_peak_memory_is_beyond_what_is_returned(device, monkeypatch):
    timer = graphs.Timer()
    peaks = iter(({"requested_bytes.all.current": 1000}, {"requested_bytes.all.peak": 1000 + 64 + 32 + 300}))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: device.log.append("reset"))
    first, second = torch.zeros(16), torch.zeros(8)
    # What is returned twice, as a residual's gradient may be, was allocated once.
    assert timer.peak_memory(lambda: [first, second, first]) == 300


def test_the_driver_is_asked_for(monkeypatch):
    monkeypatch.setattr(graphs.subprocess, "run", lambda *a, **o: SimpleNamespace(stdout="580.65\n580.65\n"))
    assert graphs._driver_version() == "580.65"

    def missing(*arguments, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(graphs.subprocess, "run", missing)
    assert graphs._driver_version() == "unknown"


def test_replays_are_told_apart_by_the_marker():
    events = [("before", 1.0), ("spin_kernel(long)", 9.0), ("a", 1.0), ("b", 2.0), ("spin_kernel(long)", 9.0)]
    assert split_replays(events) == [[("a", 1.0), ("b", 2.0)], []]


def test_kernels_are_summed_by_name_for_one_step():
    replay = [("void b<1>(int)", 2.0), ("a", 4.0), ("void b<2>(int)", 4.0), ("a", 8.0), ("a", 4.0), ("a", 4.0)]
    kernels = summed(replay, 2)
    assert kernels == [Kernel("b", 1, 3.0), Kernel("a", 2, 10.0)]
    assert listed(kernels) == "b; 2 a"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void at::native::(anonymous namespace)::batch_norm_reduce_kernel<float, int>(at::Tensor<float>)",
            "batch_norm_reduce_kernel",
        ),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, (bool)1>(Struct, int)", "cudnn::bn_fw_tr_1C11_kernel_NCHW"),
        ("triton_red_fused_native_batch_norm_0", "triton_red_fused_native_batch_norm_0"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        (
            "void cbn::map_kernel<cbn::Config<float, 4, false>, (cbn::Pass)1>(cbn::Arguments)",
            "cbn::map_kernel<cbn::Config<float, 4, false>, (cbn::Pass)1>",
        ),
    ],
)
def test_kernel_names_are_shortened(name, short):
    assert short_name(name) == short
