"""How long does a whole training step take? torchvision's ResNets with nn.BatchNorm2d and with ours, eager."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import cbn_ext
from bench.cases import MEMORY_FORMATS, shape_label
from bench.cpu import cpu_model
from bench.harness import BOTH, time_interleaved
from bench.providers import BATCHNORM, OURS
from bench.report import Table, report_name, versions, write_csvs

NORMS = (BATCHNORM, OURS, f"{OURS} fused")
#: Steps that are queued before the device is waited for, as in training, where the host runs ahead.
_STEPS = 5


class Network(NamedTuple):
    """A network of torchvision and its images (N, 3, H, W). dtype: bfloat16 is that of autocast."""

    model: str
    shape: tuple[int, ...]
    dtype: str
    layout: str

    def __str__(self) -> str:
        return " ".join((self.model, shape_label(self.shape), self.dtype, self.layout))


_KINDS = (("bfloat16", "channels_last"), ("float32", "contiguous"))
NETWORKS = {
    "cuda": [
        Network(model, (batch, 3, size, size), *kind)
        for model, batch, size in (("resnet50", 64, 224), ("resnet18", 128, 32))
        for kind in _KINDS
    ],
    "cpu": [Network("resnet18", (2, 3, 32, 32), *_KINDS[1])],
}


@dataclass(frozen=True)
class NetworkRow:
    """Time of a training step: forward, loss, backward and SGD."""

    model: str
    shape: str
    dtype: str
    layout: str
    norm: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    ratio_to_batchnorm: float


def run(device: str, seconds: float, folder: Path) -> int:
    """Measure on "cuda" or "cpu" for about `seconds`, write after every network, show; 1 where one failed.

    Raises:
        SystemExit: no torchvision, or no GPU where one was asked for.
    """
    try:
        import torchvision
    except ImportError as error:
        sys.exit(f"expected torchvision, whose networks are measured: {error}")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a GPU for whole training steps; torch finds none (--device cpu tries them without)")
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    environment = {"device": name, **versions(torch, torchvision, cbn_ext)}
    start, longest = time.monotonic(), 0.0
    rows, status = [], 0
    folder.mkdir(parents=True, exist_ok=True)
    stem = report_name("network", name)
    (folder / f"{stem}.csv").unlink(missing_ok=True)  # that of an older run would pass for this one's
    for network in NETWORKS[device]:
        begin = time.monotonic()
        if seconds - (begin - start) < longest:
            print(f"Left out, the time was over: {network}")
            continue
        print(f"{begin - start:4.0f} s: {network}", flush=True)
        try:
            with cbn_ext.use_backend("native"):
                rows += measure(network, device, seconds / 2 / len(NETWORKS[device]))
        except Exception as error:  # such as memory that does not suffice: the others are measured
            print(f"FAILED: {network}: {type(error).__name__}: {error}")
            status = 1
        write_csvs(folder, stem, {"": rows}, environment)
        longest = max(longest, time.monotonic() - begin)
    body = [
        [
            *(row.model, row.shape, row.dtype, row.layout, row.norm),
            f"{row.median_ms:.2f} ({row.p20_ms:.2f}-{row.p80_ms:.2f})",
            f"{row.ratio_to_batchnorm:.3f}",
        ]
        for row in rows
    ]
    header = ("network", "images", "dtype", "layout", "norm", "ms", f"/ {BATCHNORM}")
    print(Table("Training steps, M=4: median (20th-80th percentile)", header, [body]).text())
    return status


def measure(network: Network, device: str, seconds: float) -> list[NetworkRow]:
    """The times of a step with each kind of normalization, which take turns for about `seconds`."""
    synchronize = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize

    def wall_clock(step: Callable[[], None]) -> dict[str, float]:
        synchronize()
        start = time.perf_counter_ns()
        for _ in range(_STEPS):
            step()
        synchronize()
        return {BOTH: (time.perf_counter_ns() - start) / 1e3 / _STEPS}

    steps = {norm: training_step(network, norm, device) for norm in NORMS}
    for step in 2 * list(steps.values()):  # the second one finds its memory and SGD's momenta there
        step()
    timed = time_interleaved(steps, wall_clock, seconds / 40 / _STEPS, seconds / _STEPS)
    times = {norm: t[BOTH] for norm, t in timed.items()}
    labels, unit = network._replace(shape=shape_label(network.shape)), times[BATCHNORM].median_us
    return [
        NetworkRow(*labels, norm, t.median_us / 1e3, t.p20_us / 1e3, t.p80_us / 1e3, t.samples, t.median_us / unit)
        for norm, t in times.items()
    ]


def training_step(network: Network, norm: str, device: str) -> Callable[[], None]:
    """A function that trains the network with one of `NORMS` on random images for one step."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, network.model)(num_classes=100)
    if norm != BATCHNORM:
        model = cbn_ext.convert_compound_batchnorm(model, num_components=4, fuse=norm != OURS)
    layout = MEMORY_FORMATS[network.layout]
    model.to(device, memory_format=layout)
    images = torch.randn(network.shape, device=device).contiguous(memory_format=layout)
    classes = torch.randint(100, network.shape[:1], device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=network.dtype == "bfloat16"):
            loss = F.cross_entropy(model(images), classes)
        loss.backward()
        optimizer.step()

    return step
