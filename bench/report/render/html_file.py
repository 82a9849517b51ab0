"""report.html: one file that needs nothing else, in light and dark, on a phone and on paper."""

from __future__ import annotations

from markupsafe import Markup

from bench.report.render import plots
from bench.report.render.pages import page
from bench.report.schema import Report
from bench.report.view.whole import HEADINGS, view

__all__ = ["render"]

#: verdict -> CSS class, sign, heading. The sign and the words carry the meaning, colour only repeats it.
BADGES = {
    "no worse": ("good", "✓", "No worse"),
    "worse": ("bad", "✗", "Worse"),
    "can't tell": ("open", "?", "Can’t tell"),
    "failed": ("bad", "!", "Run failed"),
    "partial": ("open", "…", "Not complete"),
    "": ("open", "–", "Accuracy not measured"),
}


def render(report: Report) -> str:
    """Return the report as one self-contained HTML page."""
    accuracy = report.accuracy
    return page(
        "report.html.j2",
        report=report,
        view=view(report),
        headings=HEADINGS,
        badges=BADGES,
        tones={"better": "good", "no worse": "good", "worse": "bad"},
        signs={"better": "▲", "worse": "▼", "no worse": "✓"},
        accuracy_plot=Markup(plots.accuracy_plot(accuracy.tasks)) if accuracy else None,
        difference_plot=Markup(plots.difference_plot(accuracy, report.verdict.margin)) if accuracy else None,
        speed_curves=[(title, reading, Markup(svg)) for title, reading, svg in plots.speed_curves(report)],
        cdf_plots=[(title, reading, Markup(svg)) for title, reading, svg in plots.cdf_plots(report)],
    )
