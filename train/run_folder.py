"""The folder of a run: resolved configuration, metrics, checkpoints; safe against being killed at any moment.

Every file appears under its name only when it is complete. The last checkpoint is the one source of truth: it
holds the metrics of all its epochs, from which metrics.jsonl is written anew on resuming.
"""

import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from train.config import Config, differing_fields
from train.errors import UserError

# How a run is carried out, not what it computes: these may change on resuming.
FREE_ON_RESUME = {"device", "data.workers", "data.memory_gib"}


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` as a whole or, whatever happens, not at all.

    Raises:
        UserError: the disk is full or not writable; the previous file is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the new name, too, must outlive a power cut
        finally:
            os.close(directory)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kept = "the previous one is kept" if path.exists() else "nothing was there before"
        raise UserError(f"cannot write {path}: {error.strerror} ({kept})") from error


class RunFolder:
    """A run's files.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        last, best, metrics, report: its files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.last = path / "last.pt"
        self.best = path / "best.pt"
        self.report = path / "report.html"

    def create(self, config: Config) -> None:
        """Make the folder and write the resolved configuration.

        Raises:
            UserError: the folder holds something already, or cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # A run killed before it had written its configuration leaves at most a partial file.
            occupied = [p for p in self.path.iterdir() if p.suffix != ".partial"]
        except OSError as error:
            raise UserError(f"cannot make the folder {self.path}: {error.strerror}") from error
        if occupied:
            raise UserError(f"{self.path} is not empty; --resume {self.path} goes on with the run in it")
        write_atomically(self.config, yaml.safe_dump(asdict(config), sort_keys=False).encode())

    def require_run(self) -> None:
        """Check that a run was begun in the folder.

        Raises:
            UserError: it was not.
        """
        if not self.config.is_file():
            raise UserError(f"there is no run in {self.path}: it has no {self.config.name}")

    def require_same(self, config: Config) -> None:
        """Check that a run goes on with the configuration with which it began.

        Raises:
            UserError: naming the fields that differ.
        """
        _require_same(config, yaml.safe_load(self.config.read_text()), self.config)

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; the last one has ``final`` where the run is over."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint: tensors, numbers, strings, lists and dictionaries only.

        Raises:
            UserError: the disk is full or not writable.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())

    def load(self, path: Path, config: Config) -> dict[str, Any]:
        """Read a checkpoint of the configuration `config`.

        Raises:
            UserError: the file is damaged, or belongs to another configuration.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            stored = state["config"]
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise UserError(f"cannot read the checkpoint {path}: {error}") from error
        _require_same(config, stored, path)
        return state

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl, a line for each record."""
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in records).encode())


def _require_same(config: Config, stored: dict[str, Any], path: Path) -> None:
    differences = [
        f"{name} is {a}, was {b}"
        for name, a, b in differing_fields(asdict(config), stored)
        if name not in FREE_ON_RESUME
    ]
    if differences:
        raise UserError(f"{path} belongs to another configuration: {'; '.join(differences)}")
