"""A comparison in markdown, as a comment on a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.compare import view
from bench.report.compare.comparison import Comparison
from toolkit.tables import markdown as table

__all__ = ["render"]

#: Rows of flipped answers and characters a cell: a comment holds 65,536.
FLIPS, BRIEF = 40, 120


def render(found: Sequence[Comparison]) -> str:
    """Return the comparison: verdicts, then figures, then questions that flipped, folded."""
    columns = view.columns(found)
    parts = []
    for comparison in found:
        judged, sentence = view.headline(comparison)
        parts.append(f"**{judged}**: {sentence}" if judged else sentence)
        parts += [f"> **regression**: {line}" for line in comparison.regressions]
        parts += [f"> can't tell: {line}" for line in comparison.undecided]
        parts += [f"> **not measured**: {line}" for line in comparison.unmeasured]
    said = view.differences(found)
    parts += ["Compared although it differs: " + "; ".join(said) + "."] if said else []
    noted = view.notes(found)
    parts += ["\n".join(f"- Note: {line}." for line in noted)] if noted else []
    head = ["", f"{columns[0].letter}: {columns[0].label}"]
    for column in columns[1:]:
        head += [f"{column.letter}: {column.label}", "change (95%)", ""]
    rows = []
    for line in view.lines(found):
        cells = [line.name, view.figure(line.metric, line.before.value)]
        for row in line.rows:
            if row is None:
                cells += ["–", "", ""]
                continue
            value, interval = view.change(row)
            shown = f"{value} ({interval})" if interval else value
            cells += [view.figure(line.metric, row.after.value), shown, " ".join(view.verdict(row))]
        rows.append(cells)
    parts.append(_table(head, rows))
    parts += [_flips(comparison) for comparison in found if comparison.flips]
    parts.append(
        "\n".join(f"- {column.letter}: {column.measured}" for column in columns)
        + "\n\nIntervals are 95%. ▲ better and ▼ worse beyond chance, ○ can't tell, · no interval."
    )
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are each one line without runs of spaces."""
    return table(_squeezed(head), list(map(_squeezed, rows)))


def _squeezed(cells: Sequence[str]) -> list[str]:
    return [" ".join(cell.split()) for cell in cells]


def _flips(found: Comparison) -> str:
    a, b = found.a, found.b
    rows = [[flip.task, flip.question, flip.right, flip.before, flip.after] for flip in view.flips(found, FLIPS)]
    short = [[cell if len(cell) <= BRIEF else f"{cell[: BRIEF - 1]}…" for cell in row] for row in rows]
    shown = "" if len(found.flips) <= FLIPS else f", {FLIPS} of them shown"
    title = f"{len(found.flips)} answers changed between right and wrong, {a.label} to {b.label}{shown}"
    title = title.replace("<", "&lt;")
    rows_shown = _table(["task", "question", "right", a.label, b.label], short)
    return f"<details><summary>{title}</summary>\n\n{rows_shown}\n\n</details>"
