"""Everything that reads or writes weights."""

__version__ = "0.1.0"
