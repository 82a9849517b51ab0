"""Real Chromium for tests of pages, driven by Playwright. Tests are skipped where none is installed.

    with chromium() as browser, browser.tab(width=390, dark=True) as tab:
        tab.open(url_or_path)
        tab.wait("document.querySelector('#answer').textContent !== ''")
        tab.page.get_by_role("button", name="Ask").click()
        tab.screenshot(path)
        assert tab.problems == []
        assert tab.accessibility_violations() == []

`tab.page` is Playwright's own page, for everything else. While `chromium()` is open, `asyncio.run` does not work in the
same thread: keep it open for a module at most.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser as _Browser
from playwright.sync_api import Page, sync_playwright

__all__ = ["Browser", "Tab", "chromium"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Tab:
    """One page, in a profile of its own, and what went wrong on it."""

    page: Page
    #: Errors and warnings of the console (violations of a content security policy are among them), uncaught
    #: exceptions, requests that failed.
    problems: list[str] = field(default_factory=list)
    #: URLs of all requests, but for data: and blob: ones.
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        page = self.page
        page.on("console", lambda m: self.problems.append(f"{m.type}: {m.text}") if m.type in _BAD else None)
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("requestfailed", lambda r: self.problems.append(f"failed: {r.url} ({r.failure})"))
        page.on("request", lambda r: None if r.url.startswith(("data:", "blob:")) else self.requests.append(r.url))

    def open(self, where: str | Path) -> None:
        """Open a URL or a file and wait until it has loaded."""
        self.page.goto(where.resolve().as_uri() if isinstance(where, Path) else where)

    def evaluate(self, expression: str, argument: Any = None) -> Any:
        """Return the value of a JavaScript expression, or of a function called with `argument`."""
        return self.page.evaluate(expression, argument)

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until a JavaScript expression holds; one that does not in time fails the test.

        Asked from outside: Playwright's own waiting calls eval, which a content security policy may forbid.
        """
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {condition}; problems: {self.problems}"
            self.page.wait_for_timeout(50)

    def viewport(self, width: int, height: int) -> None:
        """Set the size of the window's inside in CSS pixels."""
        self.page.set_viewport_size({"width": width, "height": height})

    def dark(self, on: bool = True) -> None:
        """Prefer dark colours, or light ones."""
        self.page.emulate_media(color_scheme="dark" if on else "light")

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of what the window shows."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=file, full_page=whole, animations="disabled")

    def accessibility_violations(self) -> list[str]:
        """Return what axe-core finds wrong with the page as it is now (https://dequeuniversity.com/rules/axe)."""
        found = Axe().run(self.page).response["violations"]
        return [f"{v['id']}: {v['help']}: {node['html'][:200]}" for v in found for node in v["nodes"]]


_BAD = ("error", "warning")


@dataclass(frozen=True)
class Browser:
    """A running Chromium."""

    browser: _Browser

    @contextmanager
    def tab(
        self,
        width: int = 1280,
        height: int = 800,
        *,
        dark: bool = False,
        scale: float = 1,
        phone: bool = False,
        reduced_motion: bool = False,
        offline: bool = False,
    ) -> Iterator[Tab]:
        """Open a tab with a fresh profile. `scale`: device pixels a CSS pixel."""
        context = self.browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            device_scale_factor=scale,
            has_touch=phone,
            is_mobile=phone,
            reduced_motion="reduce" if reduced_motion else "no-preference",
            offline=offline,
        )
        try:
            yield Tab(context.new_page())
        finally:
            context.close()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start an installed Chromium (QVL_CHROMIUM names another). Skips the test where there is none."""
    program = os.environ.get("QVL_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or name one in QVL_CHROMIUM")
    with sync_playwright() as playwright:
        # a container's root has no sandbox to give, and often a small /dev/shm
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        try:
            yield Browser(browser)
        finally:
            browser.close()
