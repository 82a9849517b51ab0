"""Reports without plots, for tests of what is measured and said: drawing them would be most of the time."""

from __future__ import annotations

import pytest

from bench.report.render import plots

DRAWN = '<svg role="img" aria-label="not drawn"></svg>'


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As plots are: markup, of one or of several with a title and a reading. Drawn in tests of reports' pages."""
    for name in ("accuracy_plot", "difference_plot"):
        monkeypatch.setattr(plots, name, lambda *given: DRAWN)
    for name in ("speed_curves", "cdf_plots"):
        monkeypatch.setattr(plots, name, lambda report: [("Not drawn", "", DRAWN)])
