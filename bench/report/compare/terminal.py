"""A comparison in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from bench.report.compare import view
from bench.report.compare.comparison import Comparison
from toolkit.tables import table

__all__ = ["show"]


def show(found: Sequence[Comparison], console: Console, *, every: bool = False) -> None:
    """Print who is compared, each figure with its change and what it says, and accuracy question by question."""
    columns = view.columns(found)
    for column in columns:
        console.print(f"{column.letter}: {column.label} ({column.measured})", markup=False, highlight=False)
    console.print()
    for comparison, column in zip(found, columns[1:], strict=True):
        against = f"{column.letter} against {columns[0].letter}"
        _figures(comparison, (columns[0].letter, column.letter), console, every=every)
        if comparison.accuracy:
            _accuracy(comparison, f"Accuracy of {against}, by question", console)
        if comparison.gates:
            _gates(comparison, f"Conditions, {against}", console)


def _figures(found: Comparison, letters: tuple[str, str], console: Console, *, every: bool) -> None:
    figures = table(["", *letters, "change", "95% interval", "says"], range(1, 6), title="")
    for line in view.lines([found], every=every):
        if found.accuracy and line.metric.is_accuracy:
            continue  # in a table of their own
        for row in filter(None, line.rows):
            before, after = (view.figure(line.metric, figure.value) for figure in (row.before, row.after))
            name = line.name.replace(" in flight", "")
            figures.add_row(name, before, after, *view.change(row), " ".join(view.verdict(row)))
    console.print(figures, "")


def _accuracy(found: Comparison, title: str, console: Console) -> None:
    names = ["task", "n", "points", "95% interval", "lost/won", "p", "verdict"]
    accuracy = table(names, range(1, len(names)), title=title)
    for row in view.accuracy(found):
        cells = [row.task, str(row.n), row.difference.value, row.difference.interval, f"{row.lost}/{row.won}", row.p]
        accuracy.add_row(*cells, row.verdict, style="bold" if row.total else None)
    console.print(accuracy, "")


def _gates(found: Comparison, title: str, console: Console) -> None:
    gates = table(["", "change (95%)", "verdict"], (1, 2), title=title)
    for gate in found.gates:
        value, interval = view.change(gate.row)
        load = gate.row.metric.at if gate.condition.at is None else None
        name = gate.condition.text + (f" ({load})" if load else "")
        gates.add_row(name, f"{value} ({interval})" if interval else value, gate.judgement)
    console.print(gates, "", markup=False)
