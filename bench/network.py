"""How long does a whole training step take? ResNets with nn.BatchNorm2d and with ours, on the CPU or a GPU.

A step is the forward pass, the loss, the backward pass and SGD, on one batch of random images.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import cbn_ext
from bench import cpu
from bench.cases import MEMORY_FORMATS, shape_label
from bench.harness import BOTH, time_interleaved
from bench.providers import BATCHNORM, OURS
from bench.report import Environment, Report, Table, Target, number, report_name, target_table, versions, write_csvs
from train.models.resnet_cifar import ResNetCifar

EAGER, COMPILED = "eager", "compiled"
#: Options of `convert_compound_batchnorm` by the name of what the network then has; None: it is left as it is.
NORMS = {BATCHNORM: None} | {
    f"{OURS} {name}{' fused' * fuse}": {**options, "fuse": fuse}
    for fuse in (False, True)
    for name, options in {
        "M=4": {"num_components": 4},
        "joint M=4": {"num_components": 4, "responsibility": "joint"},
        "M=1": {"num_components": 1},
    }.items()
}
#: Those that are measured: compiling takes longer than measuring.
MEASURED = {EAGER: tuple(NORMS), COMPILED: (BATCHNORM, f"{OURS} M=4", f"{OURS} M=4 fused")}
#: Depths of the ResNets for small images, which are those of `train`; the others are torchvision's.
CIFAR = {"resnet20": 20, "resnet32": 32}
#: Steps of a sample, queued before the device is waited for, as in training, where the host runs ahead of a GPU.
_QUEUED = {"cpu": 1, "cuda": 5}
#: Samples of a network, at most.
_SAMPLES = {"cpu": 6, "cuda": 16}


class Network(NamedTuple):
    """A network and its images (N, 3, H, W). dtype: bfloat16 is that of autocast."""

    model: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    execution: str = EAGER

    def __str__(self) -> str:
        return " ".join(self.labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns with which its rows begin."""
        return self._replace(shape=shape_label(self.shape))


_IMAGES = (
    ("resnet20", (128, 3, 32, 32)),
    ("resnet32", (128, 3, 32, 32)),
    ("resnet18", (8, 3, 64, 64)),
    ("resnet18", (8, 3, 128, 128)),
)
_GPU_IMAGES = (("resnet50", (64, 3, 224, 224)), ("resnet18", (128, 3, 32, 32)), *_IMAGES)
_KINDS = {
    "cpu": (("float32", "contiguous"), ("float32", "channels_last")),
    "cuda": (("bfloat16", "channels_last"), ("float32", "contiguous")),
}
_PLAN = {
    "cpu": ((EAGER, _IMAGES), (COMPILED, _IMAGES[:1])),
    "cuda": ((EAGER, _GPU_IMAGES), (COMPILED, _GPU_IMAGES)),
}
#: By device, in the order in which they are measured.
NETWORKS = {
    device: [
        Network(model, shape, *kind, execution)
        for execution, images in plan
        for model, shape in images
        for kind in _KINDS[device]
    ]
    for device, plan in _PLAN.items()
}


@dataclass(frozen=True)
class NetworkRow:
    """Time of a training step; the ratio is to that with nn.BatchNorm2d, all else equal."""

    model: str
    shape: str
    dtype: str
    layout: str
    execution: str
    norm: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    ratio_to_batchnorm: float

    @property
    def network(self) -> tuple[str, ...]:
        """What it has in common with those that it is compared with."""
        return self.model, self.shape, self.dtype, self.layout, self.execution


def run(device: str, seconds: float, folder: Path) -> int:
    """Measure on "cuda" or "cpu" for about `seconds`, show and write the report; 1 where a network failed.

    The rows are written after every network, should the process end before its time.

    Raises:
        SystemExit: no GPU where one was asked for.
        RuntimeError: there are no native operators.
    """
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a GPU for whole training steps; torch finds none (--device cpu measures them without)")
    if device == "cpu":
        torch.set_num_threads(cpu.THREADS)
    e = environment(device)
    start, longest = time.monotonic(), 0.0
    rows, warnings, status = [], [], 0
    folder.mkdir(parents=True, exist_ok=True)
    stem = report_name("network", e["device"])
    (folder / f"{stem}.csv").unlink(missing_ok=True)  # that of an older run would pass for this one's

    def warn(warning: str) -> None:
        print(warning, flush=True)
        warnings.append(warning)

    for network in NETWORKS[device]:
        begin = time.monotonic()
        if network.model not in CIFAR and "torchvision" not in e:
            warn(f"Left out, torchvision is not installed: {network}")
            continue
        if seconds - (begin - start) < longest:
            warn(f"Left out, the time was over: {network}")
            continue
        print(f"{begin - start:4.0f} s: {network}", flush=True)
        try:
            with cbn_ext.use_backend("native"):
                rows += measure(network, device, seconds / 10)
        except Exception as error:  # such as memory that does not suffice: the others are measured
            warn(f"FAILED: {network}: {type(error).__name__}: {error}")
            status = 1
        write_csvs(folder, stem, {"": rows}, e)
        longest = max(longest, time.monotonic() - begin)
    if device == "cpu":
        warnings += cpu.load_warnings(cpu.LOAD)
    report = make_report(e, rows, warnings)
    report.show()
    report.write(folder)
    return status


def environment(device: str) -> Environment:
    """The machine and the versions in use, that of torchvision where it is installed."""
    machine = cpu.environment() if device == "cpu" else {"device": torch.cuda.get_device_name()}
    machine |= versions(torch, cbn_ext)
    if importlib.util.find_spec("torchvision"):
        import torchvision

        machine |= versions(torchvision)
    return machine


def measure(network: Network, device: str, seconds: float) -> list[NetworkRow]:
    """The times of a step with each kind of normalization, which take turns for `seconds` at most, or four rounds."""
    synchronize = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    queued = _QUEUED[device]

    def wall_clock(step: Callable[[], None]) -> dict[str, float]:
        synchronize()
        start = time.perf_counter_ns()
        for _ in range(queued):
            step()
        synchronize()
        return {BOTH: (time.perf_counter_ns() - start) / 1e3 / queued}

    torch.compiler.reset()  # a compiler that met too many networks would fall back to eager execution
    steps = {norm: training_step(network, norm, device) for norm in MEASURED[network.execution]}
    for step in steps.values():  # the next one finds its memory and SGD's momenta there
        step()
    timed = time_interleaved(steps, wall_clock, 0.0, seconds / queued, _SAMPLES[device])  # one sample a turn
    times = {norm: t[BOTH] for norm, t in timed.items()}
    unit = times[BATCHNORM].median_us
    return [
        NetworkRow(
            *network.labels, norm, t.median_us / 1e3, t.p20_us / 1e3, t.p80_us / 1e3, t.samples, t.median_us / unit
        )
        for norm, t in times.items()
    ]


def training_step(network: Network, norm: str, device: str) -> Callable[[], None]:
    """A function that trains the network with one of `NORMS` for one step: forward, loss, backward and SGD."""
    torch.manual_seed(0)
    model = build(network.model)
    if options := NORMS[norm]:
        model = cbn_ext.convert_compound_batchnorm(model, **options)
    layout = MEMORY_FORMATS[network.layout]
    model.to(device, memory_format=layout)
    if network.execution == COMPILED:
        model = torch.compile(model)
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


def build(model: str) -> nn.Module:
    """A network with nn.BatchNorm2d, (N, 3, H, W) -> (N, 100)."""
    if model in CIFAR:
        return ResNetCifar(CIFAR[model], num_classes=100)
    import torchvision

    return getattr(torchvision.models, model)(num_classes=100)


def make_report(e: Environment, rows: Sequence[NetworkRow], warnings: list[str]) -> Report:
    """What was measured. warnings: what was left out, and what disturbed."""
    facts = (f"{name} {value}" for name, value in e.items() if name != "device")
    return Report(
        kind="network",
        environment=e,
        facts=f"{', '.join((e['device'], *facts))}.",
        csv={"": rows},
        tables=[
            target_table("Targets (a training step, eager)", targets(rows)),
            ratio_table(rows),
            time_table(rows),
        ],
        text=_HOW,
        warnings=warnings,
    )


#: What the worst ratio of eager steps to those with nn.BatchNorm2d is to keep.
_LIMITS = (
    (f"{OURS} M=4 fused", tuple(CIFAR), 1.0),
    (f"{OURS} M=4", tuple(CIFAR), 1.1),
    (f"{OURS} M=4 fused", ("resnet18",), 1.15),
    (f"{OURS} M=4", ("resnet18",), 1.15),
    (f"{OURS} M=1 fused", (*CIFAR, "resnet18"), 1.0),
    (f"{OURS} M=1", (*CIFAR, "resnet18"), 1.0),
)


def targets(rows: Sequence[NetworkRow]) -> list[Target]:
    """What is to be reached beside what is, in each layout: of the networks named, which were measured, the worst."""
    found = []
    for layout in MEMORY_FORMATS:
        for norm, models, limit in _LIMITS:
            ratios = {
                f"{row.model} {row.shape}": row.ratio_to_batchnorm
                for row in rows
                if (row.execution, row.layout, row.norm) == (EAGER, layout, norm) and row.model in models
            }
            what = f"{norm} / {BATCHNORM}, {layout}, worst of {', '.join(ratios or models)}"
            found.append(Target(what, max(ratios.values(), default=None), "≤", limit))
    return found


def ratio_table(rows: Sequence[NetworkRow]) -> Table:
    """A line for each network: its step with nn.BatchNorm2d, and the ratio to that with each other norm."""
    others = [norm for norm in NORMS if norm != BATCHNORM]
    lines = []
    for network, group in groupby(rows, lambda row: row.network):
        of = {row.norm: row for row in group}
        ratios = (number(of[norm].ratio_to_batchnorm if norm in of else None) for norm in others)
        lines.append([*network, number(of[BATCHNORM].median_ms, 0), *ratios])
    header = (*_LABELS, f"{BATCHNORM}, ms", *(norm.removeprefix(f"{OURS} ") for norm in others))
    return Table(f"A training step with {OURS} / with {BATCHNORM}, medians", header, [lines])


def time_table(rows: Sequence[NetworkRow]) -> Table:
    """Every time."""
    header = (*_LABELS, "norm", "ms", "samples", f"/ {BATCHNORM}")
    sections = [
        [
            [
                *(*network, row.norm),
                f"{row.median_ms:.1f} ({row.p20_ms:.1f}-{row.p80_ms:.1f})",
                *(str(row.samples), f"{row.ratio_to_batchnorm:.3f}"),
            ]
            for row in group
        ]
        for network, group in groupby(rows, lambda row: row.network)
    ]
    return Table("A training step: median (20th-80th percentile)", header, sections)


_LABELS = ("network", "images", "dtype", "layout", "execution")

_HOW = """## How this was measured

- A step is the forward pass, cross entropy, the backward pass and SGD with momentum (`optimizer.step`), in training
  mode, on one batch of random images. *bfloat16* is that of `torch.autocast`; the parameters are float32.
- One process; the networks of a line take turns in rounds, every other round in the reverse order. A sample is one step
  on the CPU; on a GPU it is the mean of five, which are queued before the device is waited for. Steps before the first
  round, in which networks are compiled and memory is found, are not counted.
- *fused*: `convert_compound_batchnorm(..., fuse=True)` takes ReLUs and residual sums into the layers; *joint*: one
  mixture over the channels of a point.
- *resnet20* and *resnet32* are the ResNets for small images of `train`, the others torchvision's.
- *compiled*: `torch.compile(model)` on both sides of a ratio. To compile a network takes longer than to measure it, so
  joint mode and M=1 are left out there and, on the CPU, all networks but ResNet-20."""
