"""What all tests share: the table of cases, the oracle that judges them and the tolerances."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
