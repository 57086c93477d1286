"""What the profiler saw on a device, told apart by replay and summed by kernel."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

#: The kernel of torch.cuda._sleep, which stands before every replay.
_MARKER = "spin_kernel"


@dataclass(frozen=True)
class Kernel:
    """A kernel of one direction: calls, and microseconds on the device, both of one step."""

    name: str
    calls: float
    microseconds: float


def split_replays(events: Sequence[tuple[str, float]]) -> list[list[tuple[str, float]]]:
    """Events (name, microseconds), in the order of their starts, by the marker that they follow."""
    replays: list[list[tuple[str, float]]] = []
    for name, microseconds in events:
        if _MARKER in name:
            replays.append([])
        elif replays:
            replays[-1].append((name, microseconds))
    return replays


def summed(replay: Sequence[tuple[str, float]], steps: int) -> list[Kernel]:
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


def listed(kernels: Sequence[Kernel]) -> str:
    """Kernels in one cell of a table, with the number of calls where it is not one."""
    return "; ".join(k.name if k.calls == 1 else f"{k.calls:g} {k.name}" for k in kernels)
