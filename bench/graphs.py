"""All of the CUDA benchmark that needs a GPU: steps captured in graphs, replayed, traced and weighed.

A graph's replay has none of the host's time in it, so kernels of a few microseconds can be told apart.
"""

import gc
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cbn_ext
from bench.harness import BACKWARD, BOTH, EVALUATION, FORWARD
from bench.providers import LayerWorkload
from bench.trace import Kernel, split_replays, summed

#: Cycles for which the GPU waits while the replays behind it are queued: half a millisecond.
_LAUNCH_CYCLES = 1_000_000


@dataclass(frozen=True)
class Environment:
    """Where and with what the numbers were made; copy_gb_per_s: what a copy in the same run read and wrote."""

    device: str
    driver: str
    cuda: str
    cudnn: int | None
    torch: str
    cbn_ext: str
    date: str
    copy_gb_per_s: float

    @property
    def facts(self) -> str:
        """The same in sentences."""
        return (
            f"{self.device}, driver {self.driver}; CUDA {self.cuda}, cuDNN {self.cudnn}, torch {self.torch}, "
            f"cbn_ext {self.cbn_ext}; {self.date}. A copy on the device moves {self.copy_gb_per_s:,.0f} GB/s."
        )


@dataclass(frozen=True)
class Captured:
    """Graphs of many steps each, replayed one after the other; the third one, of evaluations, need not be there.

    cold: every step has tensors of its own, and the graphs are all forwards, all backwards, all evaluations. Else
    all steps share their tensors, and the graphs are forwards, then steps (forward and backward), then evaluations.
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
        return Environment(
            device=torch.cuda.get_device_name(),
            driver=_driver_version(),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            torch=torch.__version__,
            cbn_ext=cbn_ext.__version__,
            date=date.today().isoformat(),
            copy_gb_per_s=self.copy_bandwidth(),
        )

    def copy_bandwidth(self, tensor_bytes: int = 2**30, copies: int = 20) -> float:
        """GB/s that a device-to-device copy reads and writes."""
        source = torch.ones(tensor_bytes, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        events = self._events(copies + 1)
        for event in events:
            target.copy_(source)
            event.record()
        events[-1].synchronize()
        times = [start.elapsed_time(end) for start, end in pairwise(events)]
        return 2 * tensor_bytes / median(times) / 1e6

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
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in returned}
        return peak - before - sum(storages.values())

    def capture(self, workloads: Sequence[LayerWorkload], cold: bool, evaluation: bool = True) -> Captured:
        """Graphs of one step of each workload, which are equal but for their tensors; one must have run before."""
        graphs = tuple(torch.cuda.CUDAGraph() for _ in range(3 if evaluation else 2))
        # What a step leaves is freed, and its memory used by the next one, unless it is kept here.
        outputs, kept = [], []
        with torch.cuda.graph(graphs[0], stream=self.stream):
            for workload in workloads:
                output = workload.forward()
                if cold:
                    outputs.append(output)
                del output
        with torch.cuda.graph(graphs[1], pool=graphs[0].pool(), stream=self.stream):
            for number, workload in enumerate(workloads):
                gradients = workload.backward(outputs[number] if cold else workload.forward())
                if cold:
                    kept.append(gradients)
                del gradients
        if evaluation:
            with torch.cuda.graph(graphs[2], pool=graphs[0].pool(), stream=self.stream):
                for workload in workloads:
                    output = workload.evaluate()
                    if cold:
                        kept.append(output)
                    del output
        return Captured(graphs, len(workloads), cold)

    def measure(self, captured: Captured) -> dict[str, float]:
        """Microseconds of one step in each direction, from one replay of every graph."""
        events = self._events(len(captured.graphs) + 1)
        torch.cuda._sleep(_LAUNCH_CYCLES)
        events[0].record()
        for graph, event in zip(captured.graphs, events[1:], strict=True):
            graph.replay()
            event.record()
        events[-1].synchronize()
        first, second, *evaluation = (start.elapsed_time(end) * 1e3 / captured.steps for start, end in pairwise(events))
        backward, both = (second, first + second) if captured.cold else (second - first, second)
        times = {FORWARD: first, BACKWARD: backward, BOTH: both}
        return times | ({EVALUATION: evaluation[0]} if evaluation else {})

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
        replays = split_replays([(event.name(), event.duration_ns() / 1e3) for event in events])
        expected = sum(len(one.graphs) for one in captured)
        if len(replays) != expected:
            raise RuntimeError(f"expected the trace of {expected} replays, got that of {len(replays)}")
        remaining = iter(replays)
        return [
            {
                direction: summed(next(remaining), one.steps)
                for direction, _ in zip((FORWARD, BACKWARD, EVALUATION), one.graphs, strict=False)
            }
            for one in captured
        ]

    def _events(self, count: int) -> list[torch.cuda.Event]:
        return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, check=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
