"""`python -m bench`: measure what this machine has, print the tables, write them to bench/results/."""

import sys
from pathlib import Path

from rich.console import Console

from bench import cpu
from bench.providers import WrongResultError


def main() -> None:
    """Run the CPU part."""
    console = Console()
    try:
        report = cpu.run()
    except WrongResultError as error:
        sys.exit(f"nothing was timed: {error}")
    report.show(console)
    for path in report.write(Path(__file__).parent / "results"):
        console.print(f"wrote bench/results/{path.name}")


if __name__ == "__main__":
    main()
