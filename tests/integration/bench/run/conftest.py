from __future__ import annotations

from tests.support.no_plots import no_plots

__all__ = ["no_plots"]
