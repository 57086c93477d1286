"""What a run leaves: the summary, and one archive of everything."""

import io
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SUMMARY_LINES = 100
BENCHMARK_LINES = 60  # of these
FAILURES = 20  # of one step, where there is room
WIDTH = 160

#: Of a log longer than twice this, only the first and the last bytes are read and archived: a run's logs, which are
#: text, then make an archive of less than 16 MiB.
END = 1 << 20

_PYTEST_FAILURE = re.compile(r"(?:FAILED|ERROR) (?:python_tests/gpu/)?(\S+\.py\b.*)")
_ERRORS = (
    # Python's; of compilers, shells and ncu; compute-sanitizer's.
    r"(?:E +)?[\w.]*(?:Error|Exception|Exit|Interrupt)\b",
    r".*(?:\b(?:error|fatal error): |not found|undefined reference|==ERROR==)|nvcc fatal|ERROR: ",
    r"========= (?:Invalid|Misaligned|Barrier|Error|Program hit)",
)
_ERROR = re.compile("|".join(_ERRORS))
_LESS_CLEAR = re.compile(r"FAILED\b|.*\b(?:[Ee]rror|failed)\b")


@dataclass(frozen=True)
class Outcome:
    """What became of a step: "ok" and what proves it, or what went wrong and lines of its log that say why."""

    seconds: float
    result: str
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.result.startswith("ok")


def read_ends(path: Path) -> bytes:
    """A log; of a huge one its beginning and end."""
    with path.open("rb") as file:
        content = file.read(2 * END)
        left_out = path.stat().st_size - len(content)
        if left_out > 0:
            file.seek(-END, io.SEEK_END)
            content = content[:END] + f"\n[... {left_out} bytes left out ...]\n".encode() + file.read(END)
    return content


def failures(log: str) -> list[str]:
    """The lines of a log that say what went wrong: each failed test, else the first line that looks like an error."""
    lines = log.splitlines()
    tests = [match[1] for line in lines if (match := _PYTEST_FAILURE.match(line))]
    if tests:
        return tests
    for pattern in (_ERROR, _LESS_CLEAR):
        if match := next(filter(pattern.match, lines), None):
            return [match.strip()]
    written = [line.strip() for line in lines if line.strip()]
    return [f"no error in its output, which ends: {written[-1]}" if written else "it printed nothing"]


def summary(title: str, names: Iterable[str], outcomes: dict[str, Outcome]) -> list[str]:
    """A line for each step, and what failed: so many lines that the benchmark's fit in too."""
    lines = [f"--- {title}"]
    for name in names:
        outcome = outcomes.get(name, Outcome(0, "not run"))
        lines.append(shorten(f"{name:<14} {outcome.seconds:4.0f} s  {outcome.result}"))
    failed = {name: outcome.failures for name, outcome in outcomes.items() if outcome.failures}
    if failed:
        # Two lines are headings: this one, and the benchmark's.
        room = (SUMMARY_LINES - BENCHMARK_LINES - 2 - len(lines)) // len(failed)
        lines.append("--- failed")
        for name, found in failed.items():
            lines += [shorten(f"{name}: {line}") for line in _first(found, min(room, FAILURES + 1))]
    return lines


def _first(lines: Sequence[str], count: int) -> list[str]:
    """At most so many; the last then says how many more there are."""
    if len(lines) <= count:
        return list(lines)
    return [*lines[: count - 1], f"and {len(lines) - count + 1} more"]


def shorten(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..."


def write_archive(path: Path, folders: Sequence[Path]) -> None:
    """Archive the files of these folders. An archive that is there already stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as archive:
        for file in sorted(file for folder in folders for file in folder.glob("*") if file.is_file()):
            info = archive.gettarinfo(str(file))
            content = read_ends(file) if file.suffix == ".log" else file.read_bytes()
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    partial.replace(path)
