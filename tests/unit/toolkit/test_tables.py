"""Tables: which column is on which side, what may wrap, and cells that hold any text."""

from __future__ import annotations

import io

from rich.console import Console

from toolkit.tables import markdown, table


def printed(shown: object, width: int = 40) -> list[str]:
    written = io.StringIO()
    Console(width=width, file=written).print(shown)
    return [line.rstrip() for line in written.getvalue().splitlines()]


def test_figures_are_flush_right_and_the_title_left() -> None:
    shown = table(["load", "ms"], (1,), title="Speed")
    shown.add_row("1", "12.3")
    shown.add_row("16 in flight", "4")
    assert printed(shown) == ["Speed", "load            ms", "1             12.3", "16 in flight     4"]


def test_a_rule_goes_under_the_heads_when_asked_for() -> None:
    shown = table(["port", "state"], ruled=True)
    shown.add_row("8000", "ready")
    assert any(set(line.strip()) == {"─"} for line in printed(shown))


def test_cells_are_cut_unless_their_column_may_wrap() -> None:
    for wrapped, lines in (((), 2), ((0,), 4)):
        shown = table(["name"], wrapped=wrapped)
        shown.add_row("word " * 5)
        assert len(printed(shown, width=10)) == lines, wrapped


def test_markdown_keeps_what_a_cell_holds_inside_it() -> None:
    text = markdown(["", "said"], [["a", "x|y\n<b>"]])
    assert text == "|  | said |\n| --- | ---: |\n| a | x\\|y &lt;b> |"
