"""Tables, in the terminal and in markdown: the one place that says how they look."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["markdown", "table"]


def table(
    names: Sequence[str],
    right: Collection[int] = (),
    *,
    title: str | None = None,
    ruled: bool = False,
    wrapped: Collection[int] = (),
    fold: bool = False,
) -> Table:
    """Return an empty table for a terminal, to which the caller adds rows.

    Args:
        names: heads of the columns.
        right: numbers of the columns that are flush right, such as those of figures.
        title: above it, in bold; the heads are dim then.
        ruled: a line goes under the heads.
        wrapped: numbers of the columns whose cells may take several lines; others are cut.
        fold: cells that are too long break anywhere, rather than between words.
    """
    from rich import box
    from rich.table import Table

    shown = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="table.header" if title is None else "dim",
        box=box.SIMPLE_HEAD if ruled else None,
        pad_edge=False,
    )
    for index, name in enumerate(names):
        shown.add_column(
            name,
            justify="right" if index in right else "left",
            no_wrap=index not in wrapped,
            overflow="fold" if fold else "ellipsis",
        )
    return shown


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown, its first column flush left, the others right; cells may hold any text."""

    def line(cells: Sequence[str]) -> str:
        # Text that a model wrote must neither end a cell nor be taken for a tag.
        plain = (cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(plain) + " |"

    return "\n".join([line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows)])
