"""The helper that drives Chromium notices what it is there to notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, chromium

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


GOOD = '<!doctype html><html lang="en"><title>t</title><main><h1>Hello</h1></main>'


def test_a_good_page_has_no_problems(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(GOOD)
    with browser.tab(width=390, height=700, dark=True) as tab:
        tab.open(page)
        tab.wait("document.readyState === 'complete'")
        assert tab.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [390, True]
        tab.dark(False)
        tab.viewport(800, 600)
        assert tab.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [800, False]
        tab.screenshot(tmp_path / "shot.png")
        assert (tmp_path / "shot.png").stat().st_size > 1000
        assert tab.problems == [] and tab.accessibility_violations() == []
        assert tab.requests == [page.as_uri()]


def test_a_bad_page_shows_each_of_its_problems(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html>"
        "<meta http-equiv=Content-Security-Policy content=\"img-src 'none'; script-src 'unsafe-inline'\">"
        "<img src=http://127.0.0.1:9/x.png><script>console.error('said'); throw Error('thrown')</script>"
    )
    with browser.tab() as tab:
        tab.open(page)
        tab.wait("document.readyState === 'complete'")
        found = "\n".join(tab.problems)
        assert "said" in found and "thrown" in found and "Content Security Policy" in found
        assert any("image-alt" in violation for violation in tab.accessibility_violations())
