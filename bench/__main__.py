"""`python -m bench [cpu | cuda | network | sass]`: measure, print the tables, write them to bench/results/.

Without a name: layers and whole networks on what this machine has, the CPU and, where there is one, the GPU.
"""

import argparse
import sys
from pathlib import Path

import torch

import bench.cuda.report
import bench.sass.report
from bench import cpu, network
from bench.cases import WrongResultError

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the parts asked for; ends with an error where a result of ours was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parts = ("cpu", "cuda", "network", "sass")
    parser.add_argument("part", nargs="?", choices=parts, help="default: cpu and cuda, with network on each")
    parser.add_argument(
        "--seconds", type=float, default=600, help="time for cuda, and for network; what is left out is reported"
    )
    parser.add_argument("--sweep", action="store_true", help="cuda: compare the operators' paths and constants")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of network")
    parser.add_argument("--library", type=Path, help="what sass reads; default: the CUDA library of cbn_ext")
    arguments = parser.parse_args()
    if arguments.part == "sass":
        bench.sass.report.run(arguments.library, RESULTS)
    if arguments.part == "network":
        sys.exit(network.run(arguments.device, arguments.seconds, RESULTS))
    if arguments.part in (None, "cpu"):
        try:
            cpu.run(RESULTS)
        except WrongResultError as error:
            sys.exit(f"nothing was timed: {error}")
    if arguments.part == "cuda":
        sys.exit(bench.cuda.report.run(arguments.seconds, RESULTS, arguments.sweep))
    if arguments.part is None:
        failed = network.run("cpu", arguments.seconds, RESULTS)
        if torch.cuda.is_available():
            failed |= bench.cuda.report.run(arguments.seconds, RESULTS)
            failed |= network.run("cuda", arguments.seconds, RESULTS)
        sys.exit(failed)


if __name__ == "__main__":
    main()
