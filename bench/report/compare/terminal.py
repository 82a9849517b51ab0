"""A comparison in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.report import words
from bench.report.compare import view
from bench.report.compare.figures import Comparison

__all__ = ["show"]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def show(found: Sequence[Comparison], console: Console, *, every: bool = False) -> None:
    """Print who is compared, each figure with its change and what it says, and accuracy question by question."""
    columns = view.columns(found)
    for column in columns:
        console.print(f"{column.letter}: {column.label} ({column.measured})", markup=False, highlight=False)
    console.print()
    for comparison, column in zip(found, columns[1:], strict=True):
        table = _table("", ["", columns[0].letter, column.letter, "change", "95% interval", "says"])
        for line in view.lines([comparison], every=every):
            if comparison.accuracy and line.metric.is_accuracy:
                continue  # in a table of their own
            for row in filter(None, line.rows):
                before, after = (view.figure(line.metric, figure.value) for figure in (row.before, row.after))
                name = line.name.replace(" in flight", "")
                table.add_row(name, before, after, *view.change(row), " ".join(view.verdict(row)))
        console.print(table, "")
        if comparison.accuracy:
            _accuracy(comparison, f"Accuracy of {column.letter} against {columns[0].letter}, by question", console)
        if comparison.gates:
            gates = _table(f"Conditions, {column.letter} against {columns[0].letter}", ["", "change (95%)", "verdict"])
            for gate in comparison.gates:
                value, interval = view.change(gate.row)
                load = gate.row.metric.at if gate.condition.at is None else None
                name = gate.condition.text + (f" ({load})" if load else "")
                gates.add_row(name, f"{value} ({interval})" if interval else value, gate.judgement)
            console.print(gates, "", markup=False)


def _accuracy(found: Comparison, title: str, console: Console) -> None:
    table = _table(title, ["task", "n", "points", "95% interval", "lost/won", "p", "verdict"])
    for row in [*found.tasks, *([found.accuracy] if found.accuracy else [])]:
        d = row.difference
        table.add_row(
            row.task,
            str(row.n),
            words.points(d.value),
            words.interval(d),
            f"{d.lost}/{d.won}",
            words.p_value(row.p_adjusted),
            row.verdict,
            style="bold" if row is found.accuracy else None,
        )
    console.print(table, "")
