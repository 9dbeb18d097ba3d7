"""Shared helpers: tiny networks and runs, images and tars, servers, processes, commands."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests/files"
