"""Runs ``python -m toolkit.demo``."""

from toolkit.console import run
from toolkit.demo.cli import app

run(app)
