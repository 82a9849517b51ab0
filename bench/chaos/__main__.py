"""Runs ``python -m bench.chaos``."""

from bench.chaos.cli import app
from toolkit.console import run

run(app)
