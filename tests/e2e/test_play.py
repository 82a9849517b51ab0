"""The page at /play in real Chromium, against two real servers behind their guards.

QVL_IMAGES=docs/images has the last test write the guide's images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.http.images import image_url
from tests.e2e.conftest import Guarded, Question
from tests.support.browser import Browser, Tab, chromium
from tests.support.play_app import ask, drop, failures, finished, texts

#: On one worker with the others that need these two servers.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("guarded")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def open_page(tab: Tab, guarded: Guarded) -> None:
    """Open the page and enter the key, by keyboard."""
    tab.open(f"{guarded.url}/play")
    tab.wait("document.activeElement && document.querySelector('#sides li')")
    tab.page.get_by_label("API key").focus()
    tab.page.keyboard.type(guarded.key)
    tab.page.keyboard.press("Tab")
    tab.wait("document.querySelector('#sides').textContent === 'demo-awqdemo'")


def from_api(url: str, key: str, model: str, question: Question) -> str:
    content = [
        {"type": "image_url", "image_url": {"url": image_url(str(question.image))}},
        {"type": "text", "text": question.question},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 256,
    }
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120, trust_env=False)
    return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])


def test_both_sides_answer_as_their_apis_do(browser: Browser, guarded: Guarded, questions: list[Question]) -> None:
    asked = questions[::5]
    expected = [
        [from_api(guarded.url, guarded.key, "demo-awq", q), from_api(guarded.narrow_url, guarded.key, "demo", q)]
        for q in asked
    ]
    with browser.tab() as tab:
        open_page(tab, guarded)
        for question, answers in zip(asked, expected, strict=True):
            if tab.page.get_by_role("button", name="Start over").is_visible():
                tab.page.get_by_role("button", name="Start over").click()
            drop(tab, (question.image.name, "image/png", question.image.read_bytes()))
            tab.wait("document.querySelectorAll('#images li').length === 1")
            ask(tab, question.question)
            assert texts(tab) == answers, question.question
            same = tab.page.locator(".turn:last-child .verdict").inner_text() == "Both answers are the same."
            assert same == (answers[0] == answers[1])
        figures = tab.evaluate("[...document.querySelectorAll('.turn:last-child dd')].map(e => e.textContent)")
        assert len(figures) == 8 and all(any(c.isdigit() for c in f) for f in (figures[0], figures[2], figures[3]))
        assert tab.problems == [] and tab.accessibility_violations() == []
        assert all(url.startswith(guarded.url) for url in tab.requests)


def test_the_sample_and_a_second_question(browser: Browser, guarded: Guarded) -> None:
    with browser.tab() as tab:
        open_page(tab, guarded)
        tab.page.get_by_role("button", name="Use the sample").click()
        tab.wait("document.activeElement.id === 'question'")
        tab.page.keyboard.press("Enter")
        tab.wait("document.querySelectorAll('.turn').length === 1")
        finished(tab)
        assert texts(tab)[1] == "A 35, B 10, C 45, D 25"  # what the sample shows
        ask(tab, "What is the value of bar C?")
        assert len(texts(tab)) == 2 and all(texts(tab)) and tab.problems == []


def test_the_guard_s_refusals_are_read_out(browser: Browser, guarded: Guarded) -> None:
    with browser.tab() as tab:
        tab.open(f"{guarded.url}/play")
        tab.page.get_by_label("API key").fill("wrong")
        tab.page.keyboard.press("Tab")
        tab.wait("document.querySelector('#sides').textContent.includes('Is the API key under Settings right?')")
        tab.problems.clear()
        tab.page.get_by_label("API key").fill(guarded.key)
        tab.page.keyboard.press("Tab")
        tab.wait("document.querySelector('#sides').textContent === 'demo-awqdemo'")
        ask(tab, "What is <|image_pad|> here?")
        assert len(failures(tab)) == 2 and all("<|image_pad|>" in failure for failure in failures(tab))
        assert tab.evaluate("document.querySelector('#question').value") == "What is <|image_pad|> here?"
        assert all("status of 400" in problem for problem in tab.problems)


#: Dark before a release: the page's colours are looked at in tests/integration/serve/page.
DARK = [pytest.param(False, id="light"), pytest.param(True, id="dark", marks=pytest.mark.release)]


@pytest.mark.parametrize("dark", DARK)
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_images_of_the_page(browser: Browser, guarded: Guarded, tmp_path: Path, phone: bool, dark: bool) -> None:
    name = f"play{'-phone' if phone else ''}{'-dark' if dark else ''}.png"
    width, height = (390, 844) if phone else (1280, 900)
    with browser.tab(width, height, dark=dark, phone=phone, scale=2 if phone else 1) as tab:
        open_page(tab, guarded)
        tab.page.get_by_label("Ask one server after the other").check()
        tab.page.locator("#settings").evaluate("e => { e.open = false; }")
        tab.page.get_by_role("button", name="Use the sample").click()
        tab.wait("document.activeElement.id === 'question'")
        tab.page.keyboard.press("Enter")
        tab.wait("document.querySelector('.verdict')")
        tab.evaluate("document.activeElement.blur()")
        file = Path(os.environ.get("QVL_IMAGES", tmp_path)) / name
        if not dark or "QVL_IMAGES" not in os.environ:
            tab.screenshot(file)
            assert file.stat().st_size > 20_000
        assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") == width
