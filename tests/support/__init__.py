"""What several test modules need; no test module imports another."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
