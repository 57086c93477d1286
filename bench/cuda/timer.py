"""All of the CUDA benchmark that needs a GPU: steps captured in graphs, replayed, traced and weighed.

A graph's replay has none of the host's time in it, so kernels of a few microseconds can be told apart.
"""

import gc
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cbn_ext
from bench.harness import BACKWARD, BOTH, EVALUATION, FORWARD, gigabytes_per_second
from bench.providers import LayerWorkload
from bench.report import Environment, versions

#: Cycles for which the GPU waits while the replays behind it are queued: half a millisecond.
_LAUNCH_CYCLES = 1_000_000
#: The kernel of torch.cuda._sleep, which stands before every replay.
_MARKER = "spin_kernel"


@dataclass(frozen=True)
class Kernel:
    """A kernel of one direction: calls, and microseconds on the device, both of one step."""

    name: str
    calls: float
    microseconds: float


@dataclass(frozen=True)
class Captured:
    """Graphs of many steps each, replayed one after the other; the third one, of evaluations, need not be there.

    cold: every step has tensors of its own, and the graphs are all forwards, all backwards, all evaluations. Else all
    steps share their tensors, and the graphs are forwards, then steps (forward and backward), then evaluations.
    """

    graphs: tuple[torch.cuda.CUDAGraph, ...]
    steps: int
    cold: bool


class Timer:
    """Measures workloads on the current CUDA device, on a stream of its own, which it makes the current one.

    Autograd runs a backward pass on the stream of its forward pass, and graphs cannot be captured from the default one.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        # The tracer must be there before the first graph is: it does not see the kernels of older ones.
        with profile(activities=[ProfilerActivity.CUDA]):
            torch.cuda._sleep(1)

    @property
    def cache_bytes(self) -> int:
        """Size of the L2 cache."""
        return torch.cuda.get_device_properties().L2_cache_size

    def environment(self) -> Environment:
        """The device, the versions, and the copy bandwidth, measured here and now."""
        return {
            "device": torch.cuda.get_device_name(),
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **versions(torch, cbn_ext),
            "copy_gb_per_s": self.copy_bandwidth(),
        }

    def copy_bandwidth(self, tensor_bytes: int = 2**30, copies: int = 20) -> float:
        """GB/s that a device-to-device copy reads and writes."""
        source = torch.ones(tensor_bytes, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        events = _events(copies + 1)
        for event in events:
            target.copy_(source)
            event.record()
        return gigabytes_per_second(FORWARD, tensor_bytes, 1e3 * median(_elapsed(events)))

    def synchronize(self) -> None:
        """Wait for the device; raises what went wrong on it."""
        torch.cuda.synchronize()

    def release(self) -> None:
        """Give back the memory of what is not needed any more."""
        torch.cuda.synchronize()
        if torch.cuda.memory_allocated() > 2**30:  # held in cycles, which take long to look for
            gc.collect()
        torch.cuda.empty_cache()

    def peak_memory(self, step: Callable[[], Sequence[Tensor]]) -> int:
        """Peak bytes that `step` requests from the caching allocator beyond the tensors it returns."""
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        returned = step()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - distinct_bytes(returned)

    def capture(self, workloads: Sequence[LayerWorkload], cold: bool, evaluation: bool) -> Captured:
        """Graphs of one step of each workload, which are equal but for their tensors; one must have run before."""
        graphs: list[torch.cuda.CUDAGraph] = []

        def graph() -> AbstractContextManager:
            pool = graphs[0].pool() if graphs else None
            graphs.append(torch.cuda.CUDAGraph())
            return torch.cuda.graph(graphs[-1], pool=pool, stream=self.stream)

        run_steps(workloads, cold, evaluation, graph)
        return Captured(tuple(graphs), len(workloads), cold)

    def measure(self, captured: Captured) -> dict[str, float]:
        """Microseconds of one step in each direction, from one replay of every graph."""
        events = _events(len(captured.graphs) + 1)
        torch.cuda._sleep(_LAUNCH_CYCLES)
        events[0].record()
        for graph, event in zip(captured.graphs, events[1:], strict=True):
            graph.replay()
            event.record()
        return step_times(_elapsed(events), captured.steps, captured.cold)

    def kernels(self, captured: Sequence[Captured]) -> list[dict[str, list[Kernel]]]:
        """What ran on the device, by direction, in the graphs of each, which must be cold."""
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for one in captured:
                for graph in one.graphs:
                    torch.cuda._sleep(1)
                    graph.replay()
        events = profiler.profiler.kineto_results.events()
        events = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda event: event.start_ns())
        trace = [(event.name(), event.duration_ns() / 1e3) for event in events]
        return kernels_by_direction(trace, [(len(one.graphs), one.steps) for one in captured])


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def _elapsed(events: Sequence[torch.cuda.Event]) -> list[float]:
    """Milliseconds from each event to the next."""
    events[-1].synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, check=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of the tensors, of what several of them share once."""
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def run_steps(
    workloads: Sequence[LayerWorkload], cold: bool, evaluation: bool, graph: Callable[[], AbstractContextManager]
) -> None:
    """Run one step of each workload as `Captured` says, inside of two or three `graph()`s.

    What a step leaves is freed, and its memory used by the next one, unless it is cold: then it is kept to the end.
    """
    outputs, kept = [], []
    with graph():
        for workload in workloads:
            output = workload.forward()
            if cold:
                outputs.append(output)
            del output
    with graph():
        for number, workload in enumerate(workloads):
            gradients = workload.backward(outputs[number] if cold else workload.forward())
            if cold:
                kept.append(gradients)
            del gradients
    if evaluation:
        with graph():
            for workload in workloads:
                output = workload.evaluate()
                if cold:
                    kept.append(output)
                del output


def step_times(milliseconds: Sequence[float], steps: int, cold: bool) -> dict[str, float]:
    """Microseconds of one step in each direction, from the times of all graphs of a `Captured`."""
    first, second, *evaluation = (time * 1e3 / steps for time in milliseconds)
    backward, both = (second, first + second) if cold else (second - first, second)
    times = {FORWARD: first, BACKWARD: backward, BOTH: both}
    return times | ({EVALUATION: evaluation[0]} if evaluation else {})


def kernels_by_direction(
    trace: Sequence[tuple[str, float]], captured: Sequence[tuple[int, int]]
) -> list[dict[str, list[Kernel]]]:
    """The kernels of each of `captured`, (graphs, steps), from those (name, µs) of all, in the order of their starts.

    Raises:
        RuntimeError: the trace is not that of as many replays as there are graphs.
    """
    replays: list[list[tuple[str, float]]] = []
    for name, microseconds in trace:
        if _MARKER in name:
            replays.append([])
        elif replays:
            replays[-1].append((name, microseconds))
    if len(replays) != (expected := sum(graphs for graphs, _ in captured)):
        raise RuntimeError(f"expected the trace of {expected} replays, got that of {len(replays)}")
    remaining = iter(replays)
    directions = FORWARD, BACKWARD, EVALUATION
    return [{d: summed(next(remaining), steps) for d in directions[:graphs]} for graphs, steps in captured]


def summed(replay: Iterable[tuple[str, float]], steps: int) -> list[Kernel]:
    """The kernels of a replay of `steps` steps, in the order of their first calls."""
    times = defaultdict(list)
    for name, microseconds in replay:
        times[short_name(name)].append(microseconds)
    return [Kernel(name, len(each) / steps, sum(each) / steps) for name, each in times.items()]


def short_name(name: str) -> str:
    """A kernel's name without result, parameters and, unless it is our own, template arguments."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").removeprefix("at::native::")
    depth, plain = 0, []
    for end, character in enumerate(name):
        if character == "(" and depth == 0:
            name = name[:end]
            break
        depth += (character == "<") - (character == ">")
        if depth == 0 and character != ">":
            plain.append(character)
    return name if name.startswith("cbn::") else "".join(plain).rstrip()


def listed(kernels: Iterable[Kernel]) -> str:
    """Kernels in one cell of a table, with the number of calls where it is not one."""
    return "; ".join(k.name if k.calls == 1 else f"{k.calls:g} {k.name}" for k in kernels)
