"""``python -m train.compare``: several configurations, several seeds, one table.

The rows differ in nothing but normalization and paths. Each seed draws its own images, initial weights and
augmentation, the same ones in every row.
"""

import argparse
import csv
import io
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from train.config import build_parser, config_of, resolve
from train.errors import UserError
from train.run import train
from train.run_folder import RunFolder, write_atomically


class Row(NamedTuple):
    """A row of the table, and the options of its runs."""

    label: str
    options: tuple[str, ...]


CHANNEL = ("--norm=compound", "--compound.responsibility=channel")
JOINT = ("--norm=compound", "--compound.responsibility=joint")
ROWS = {
    "bn": Row("BN", ("--norm=batch", "--paths=single")),
    # The fair baseline of dual-path learning: the same passes, views and terms, and no split.
    "bn_two_passes": Row("BN, two passes + consistency", ("--norm=batch", "--paths=dual")),
    "cbn_channel": Row("CBN, channel", (*CHANNEL, "--paths=single")),
    "cbn_joint": Row("CBN, joint", (*JOINT, "--paths=single")),
    # What the second view alone brings.
    "cbn_two_passes": Row(
        "CBN, channel, two passes + consistency, no split", (*CHANNEL, "--paths=dual", "--split=false")
    ),
    "dpl_channel": Row("CBN + SBN + DPL, channel", (*CHANNEL, "--paths=dual")),
    "dpl_joint": Row("CBN + SBN + DPL, joint", (*JOINT, "--paths=dual")),
}
FIGURES = ("overall", "many", "medium", "few", "worst")


def run_row(row: str, seed: int, folder: RunFolder, options: list[str], console: Console) -> list[dict[str, Any]]:
    """The records of one run: of what is in the folder if that is complete, else gone on with or begun.

    Raises:
        UserError: what the run raises; a run of another configuration in the folder.
    """
    parser = build_parser()
    arguments = [*ROWS[row].options, *options, f"--seed={seed}", f"--data.seed={seed}"]
    config = resolve(config_of(parser.parse_args(arguments)))
    begun = folder.config.exists()
    if begun:
        folder.require_same(config)
    if not any(record.get("final") for record in folder.records()):
        console.rule(f"{ROWS[row].label}, seed {seed}")
        train(config, folder, begun, console)
    return folder.records()


def csv_row(row: str, seed: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    """One run as a line of the CSV file: fractions, empty for an absent group; seconds of training."""
    *epochs, final = records
    figures = {f"{checkpoint}_{name}": final[checkpoint][name] for checkpoint in ("last", "best") for name in FIGURES}
    seconds = round(sum(record["seconds"] for record in epochs), 1)
    return {"row": row, "seed": seed, **figures, "best_epoch": final["best"]["epoch"], "seconds": seconds}


def markdown(results: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds of the last epoch's test accuracy, in per cent."""
    lines = [f"| | {' | '.join(FIGURES)} | seeds |", f"|---{'|---:' * (len(FIGURES) + 1)}|"]
    for row, (label, _) in ROWS.items():
        runs = [result for result in results if result["row"] == row]
        cells = [_mean_and_spread([run[f"last_{name}"] for run in runs]) for name in FIGURES]
        if runs:
            lines.append(f"| {label} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: list[float | None]) -> str:
    present = [100 * value for value in values if value is not None]
    if not present:
        return "absent"
    spread = f" ± {statistics.stdev(present):.1f}" if len(present) > 1 else ""
    return f"{statistics.mean(present):.1f}{spread}"


def main(arguments: list[str]) -> None:
    """Run what is missing, and write results.csv and results.md after every run.

    Raises:
        UserError: what a run raises.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.compare",
        description="Compare normalizations and paths. Further options, such as --epochs 5, go to every run.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    chosen, options = parser.parse_known_args(arguments)
    console = Console()
    results = []
    for seed in chosen.seeds:
        for row in chosen.rows:
            records = run_row(row, seed, RunFolder(chosen.out / row / f"seed{seed}"), options, console)
            results.append(csv_row(row, seed, records))
            table = io.StringIO()
            writer = csv.DictWriter(table, results[0].keys())
            writer.writeheader()
            writer.writerows(results)
            write_atomically(chosen.out / "results.csv", table.getvalue().encode())
            write_atomically(chosen.out / "results.md", markdown(results).encode())
    console.print(markdown(results))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
