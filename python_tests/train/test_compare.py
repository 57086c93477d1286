"""The comparison of configurations."""

import csv
import json

import pytest
import torch

from train import compare
from train.config import build_parser, config_of, resolve
from train.errors import UserError

TINY = ["--epochs=1", "--data.max_per_class=12", "--data.ratio=4"]


@pytest.fixture(autouse=True)
def _threads():
    """A run sets the number of threads; the tests after it must not notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_rows_differ_in_nothing_but_normalization_and_paths():
    for row in compare.ROWS.values():
        config = resolve(config_of(build_parser().parse_args(list(row.options))))
        default = resolve(config_of(build_parser().parse_args([])))
        for name in ("depth", "epochs", "batch_size", "seed", "data", "optimizer", "loss", "threads"):
            assert getattr(config, name) == getattr(default, name)


def test_comparison(tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path), "--seeds", "3", "4", "--rows", "bn", "dpl_channel", *TINY]
    compare.main(arguments)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["seed"]) for row in rows] == [
        ("bn", "3"), ("dpl_channel", "3"), ("bn", "4"), ("dpl_channel", "4"),
    ]  # fmt: skip
    for row in rows:
        folder = tmp_path / row["row"] / f"seed{row['seed']}"
        final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert float(row["last_overall"]) == final["last"]["overall"]
        assert float(row["best_worst"]) == final["best"]["worst"]
        assert row["last_many"] == ""

    # Called again it runs nothing and writes the same.
    before = (tmp_path / "results.csv").read_bytes()
    (tmp_path / "results.csv").unlink()
    monkeypatch.setattr(compare, "train", None)
    compare.main(arguments)
    assert (tmp_path / "results.csv").read_bytes() == before


def test_a_run_of_other_options_is_not_taken_for_a_result(tmp_path):
    arguments = ["--out", str(tmp_path), "--seeds", "0", "--rows", "bn"]
    compare.main([*arguments, *TINY])
    with pytest.raises(UserError, match="belongs to another configuration: epochs is 2, was 1"):
        compare.main([*arguments, *TINY, "--epochs=2"])


def test_markdown():
    figures = {"last_many": 0.5, "last_medium": None, "last_few": 0.25, "last_worst": 0.0}
    results = [
        {"row": "bn", "seed": 0, "last_overall": 0.80, **figures},
        {"row": "bn", "seed": 1, "last_overall": 0.90, **figures},
        {"row": "cbn_joint", "seed": 0, "last_overall": 0.70, **figures},
    ]
    assert compare.markdown(results).splitlines() == [
        "| | overall | many | medium | few | worst | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| BN | 85.0 ± 7.1 | 50.0 ± 0.0 | absent | 25.0 ± 0.0 | 0.0 ± 0.0 | 2 |",
        "| CBN, joint | 70.0 | 50.0 | absent | 25.0 | 0.0 | 1 |",
    ]
