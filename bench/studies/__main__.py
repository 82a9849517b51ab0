"""Runs ``python -m bench.studies``."""

from bench.studies.cli import app
from toolkit.console import run

run(app)
