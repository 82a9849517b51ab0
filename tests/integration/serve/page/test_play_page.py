"""The page at /play in real Chromium, against apps that answer by script."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serve.app.play import Beside, Play
from serve.guard.app import Guard
from serve.settings.limits import Limits
from serve.settings.play import PlayOptions
from tests.support.browser import Browser, Tab, chromium
from tests.support.play_app import FakeVllm, ask, drop, failures, finished, serving, texts

pytestmark = pytest.mark.slow

#: Two servers, the second beside the first, and a tab that shows the page.
Setting = Callable[..., tuple[FakeVllm, FakeVllm, Tab]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def shared(browser: Browser) -> Iterator[Tab]:
    """A tab for the tests that need no other: each has an origin of its own, so nothing of one is left to the next."""
    with browser.tab() as tab:
        yield tab


@pytest.fixture
def setting(browser: Browser, shared: Tab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    with contextlib.ExitStack() as stack:

        def run(
            limits: Limits | None = None, beside: bool = True, own: bool = False, **tab: Any
        ) -> tuple[FakeVllm, FakeVllm, Tab]:
            """``own``: in a tab that no other test sees; so is one that is to be other than usual."""
            first, second = FakeVllm("demo-awq"), FakeVllm("demo")
            url = stack.enter_context(serving(second)) if beside else None
            monkeypatch.setenv("QVL_PLAY", PlayOptions(beside=url).dumps())
            monkeypatch.setenv("QVL_GUARD", (limits or Limits()).dumps())
            page = stack.enter_context(serving(Play(Guard(Beside(first) if url else first))))
            opened = stack.enter_context(browser.tab(**tab)) if own or tab else shared
            stack.callback(opened.open, "about:blank")
            opened.problems.clear()
            opened.requests.clear()
            opened.open(f"{page}/play")
            opened.wait("document.querySelector('#sides li')")
            return first, second, opened

        yield run


def encoded(width: int, height: int, kind: str = "PNG", colour: str = "navy", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind, **settings)
    return buffer.getvalue()


def images(request: dict[str, Any]) -> list[bytes]:
    """The images of a chat request's last message."""
    parts = request["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def test_a_dropped_image_is_asked_about_on_both_sides(setting: Setting) -> None:
    first, second, tab = setting()
    image = encoded(60, 40)
    drop(tab, ("night.png", "image/png", image))
    tab.wait("document.querySelectorAll('#images li').length === 1")
    assert tab.page.locator("#images li").inner_text().split("\n")[:2] == ["night.png", "60 × 40"]
    ask(tab, "What is it?")
    assert texts(tab) == ["I see 1 images and 1 messages."] * 2
    for server in (first, second):
        (_, request), *others = server.asked
        assert not others
        assert images(request) == [image]  # byte by byte, as it was
        assert request["stream_options"]["include_usage"] is True and request["temperature"] == 0
        assert request["model"] == server.name and request["max_tokens"] == 256
    figures = tab.evaluate("[...document.querySelectorAll('.figures dd')].map(e => e.textContent)")
    assert len(figures) == 8 and figures[3] == "7 (9)" and figures[1].endswith(" tokens/s")
    assert tab.page.locator(".verdict").inner_text() == "Both answers are the same."
    assert tab.evaluate("document.querySelector('#status').textContent").startswith("demo-awq: I see 1 images")
    assert tab.problems == []
    base = tab.page.url.removesuffix("play")
    assert all(url.startswith(base) for url in tab.requests)


def test_figures_are_what_a_clock_says(setting: Setting) -> None:
    first, _, tab = setting(beside=False)
    first.pause = 0.25
    ask(tab, "say one two three four five")
    seconds, speed, total, tokens = tab.evaluate(
        "[...document.querySelectorAll('.figures dd')].map(e => parseFloat(e.textContent))"
    )
    assert tokens == 5 and total == pytest.approx(5 * 0.25, rel=0.3)  # in seconds, being over one
    assert speed == pytest.approx(4 / (total - seconds / 1000), rel=0.03)  # four tokens after the first


def test_a_conversation_goes_on_with_each_side_s_own_answers(setting: Setting) -> None:
    first, second, tab = setting()
    tab.page.get_by_text("Settings", exact=True).click()
    tab.page.get_by_label("System prompt").fill("Be brief.")
    drop(tab, ("a.png", "image/png", encoded(30, 30)))
    tab.wait("document.querySelectorAll('#images li').length === 1")
    ask(tab, "First?")
    ask(tab, "Second?")
    assert texts(tab) == ["I see 0 images and 4 messages."] * 2
    for server in (first, second):
        _, request = server.asked[-1]
        assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "user"]
        assert request["messages"][0]["content"] == "Be brief."
        assert request["messages"][1]["content"][0]["type"] == "image_url"
        assert request["messages"][2]["content"] == "I see 1 images and 2 messages."
    tab.page.get_by_role("button", name="Start over").click()
    assert tab.page.locator(".turn").count() == 0
    ask(tab, "Third?")
    assert len(first.asked[-1][1]["messages"]) == 2
    assert tab.problems == []


def test_stop_ends_both_requests_and_keeps_what_was_said(setting: Setting) -> None:
    first, second, tab = setting()
    tab.page.get_by_label("Question", exact=True).fill("slow")
    tab.page.keyboard.press("Enter")
    tab.wait(
        "document.querySelectorAll('.text').length === 2 && document.querySelector('.text').textContent.length > 15"
    )
    tab.page.get_by_role("button", name="Stop").click()
    finished(tab)
    assert failures(tab) == ["Stopped.", "Stopped."] and all(text.startswith("word word") for text in texts(tab))
    deadline = time.monotonic() + 5
    while not first.abandoned or not second.abandoned:
        assert time.monotonic() < deadline
        tab.page.wait_for_timeout(20)
    ask(tab, "And now?")
    assert first.asked[-1][1]["messages"][1]["content"].startswith("word word")


def test_one_after_the_other_when_asked_so(setting: Setting) -> None:
    first, second, tab = setting()
    tab.page.get_by_text("Settings", exact=True).click()
    tab.page.get_by_label("Ask one server after the other").check()
    first.pause = 0.3
    tab.page.get_by_label("Question", exact=True).fill("say one two three")
    tab.page.keyboard.press("Enter")
    tab.wait("document.querySelector('.text')?.textContent.includes('two')")
    assert not second.asked
    finished(tab)
    assert len(second.asked) == 1 and texts(tab) == ["one two three"] * 2


HOSTILE = "<img/src=x/onerror=alert(1)><script>alert(2)</script>&lt;b&gt;"


def test_answers_errors_and_file_names_are_text(setting: Setting) -> None:
    first, _, tab = setting()
    first.name = HOSTILE  # models are listed again when the key changes
    tab.page.get_by_text("Settings", exact=True).click()
    tab.page.get_by_label("API key").fill("k")
    tab.page.get_by_label("System prompt").click()
    tab.wait("document.querySelector('#sides').textContent.includes('onerror')")
    first.name = "demo-awq"  # the guard takes no such name in a request
    tab.page.get_by_label("API key").fill("l")
    tab.page.get_by_label("System prompt").click()
    tab.wait("!document.querySelector('#sides').textContent.includes('onerror')")
    drop(tab, (f"{HOSTILE}.png", "image/png", encoded(30, 30)), (HOSTILE, "image/png", b"none"))
    tab.wait("document.querySelectorAll('#images li').length === 1")
    tab.wait("document.querySelector('#problem').textContent.includes('onerror')")
    ask(tab, f"say {HOSTILE}")
    assert texts(tab) == [HOSTILE] * 2
    ask(tab, f"refuse 400 {HOSTILE}")
    assert failures(tab) == [HOSTILE] * 2
    ask(tab, f"fail {HOSTILE}")
    assert failures(tab) == [f"The server failed: {HOSTILE}"] * 2
    assert tab.evaluate("document.querySelectorAll('main img:not([src^=\"blob:\"]), main script, b').length") == 0
    assert [p for p in tab.problems if "status of 400" not in p] == []


def test_refusals_are_shown_in_words_and_the_question_is_kept(setting: Setting) -> None:
    _, _, tab = setting(beside=False)
    drop(tab, ("a.png", "image/png", encoded(30, 30)))
    tab.wait("document.querySelectorAll('#images li').length === 1")
    ask(tab, "refuse 429 You ask too often.")
    assert failures(tab) == ["You ask too often. Try again in 7 s."]
    assert tab.page.get_by_label("Question", exact=True).input_value() == "refuse 429 You ask too often."
    assert tab.page.locator("#images li").count() == 1
    ask(tab, "break")
    assert failures(tab) == ["The answer broke off."] and texts(tab) == ["I"]
    ask(tab, "refuse 503 Draining.")
    assert failures(tab) == ["Draining."]


def test_a_server_that_vanishes_is_said_to(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, tab = setting(beside=False)
    tab.page.context.set_offline(True)
    ask(tab, "Anybody?")
    assert failures(tab) == ["The server can't be reached."]
    tab.page.context.set_offline(False)
    ask(tab, "say hello")
    assert texts(tab) == ["hello"]


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(setting: Setting, tmp_path: Path) -> None:
    first, second, tab = setting(Limits(api_key="right"))
    assert tab.page.locator("#sides").inner_text() == "Enter the API key under Settings."
    assert tab.page.get_by_label("API key").is_visible() and tab.problems == []
    ask(tab, "say hello")
    assert all("key" in failure for failure in failures(tab)) and len(failures(tab)) == 2
    assert tab.evaluate("document.activeElement.id") == "key"
    tab.page.get_by_label("API key").fill("wrong")
    tab.page.keyboard.press("Tab")
    tab.wait("document.querySelector('#sides').textContent.includes('Is the API key under Settings right?')")
    tab.page.get_by_label("API key").fill("right")
    tab.page.keyboard.press("Tab")
    tab.wait("document.querySelector('#sides').textContent === 'demo-awqdemo'")
    ask(tab, "say hello")
    assert texts(tab) == ["hello"] * 2
    assert {dict(scope["headers"])[b"authorization"] for scope, _ in first.asked + second.asked} == {b"Bearer right"}
    stored = "JSON.stringify([Object.entries(localStorage), document.cookie, Object.entries(sessionStorage).sort()])"
    kept = [["qvl-key", "right"], ["qvl-questions", '["say hello"]']]
    assert json.loads(tab.evaluate(stored)) == [[], "", kept]
    assert all("right" not in url for url in tab.requests)
    tab.page.reload()
    tab.wait("document.querySelector('#sides').textContent === 'demo-awqdemo'")


def test_a_big_photo_is_scaled_to_the_guard_s_limit_and_the_page_says_so(setting: Setting) -> None:
    first, _, tab = setting(Limits(max_image_pixels=100_000), beside=False)
    drop(tab, ("photo.jpg", "image/jpeg", encoded(3000, 2000, "JPEG")), ("small.png", "image/png", encoded(50, 50)))
    tab.wait("document.querySelectorAll('#images li').length === 2")
    said = tab.page.locator("#images").inner_text()
    assert "3000 × 2000, scaled to 387 × 258" in said and "50 × 50" in said
    ask(tab, "say ok")
    photo, small = (Image.open(io.BytesIO(image)) for image in images(first.asked[0][1]))
    assert photo.size == (387, 258) and photo.format == "JPEG" and small.size == (50, 50)
    red, green, blue = photo.convert("RGB").getpixel((100, 100))  # type: ignore[misc]
    assert red < 8 and green < 8 and 120 < blue < 136  # navy still
    assert "scaled to 387 × 258" in tab.page.locator(".turn").inner_text()


def test_a_big_photo_is_scaled_to_what_the_model_has_room_for(setting: Setting) -> None:
    first, _, tab = setting(beside=False)
    drop(tab, *[(f"{i}.jpg", "image/jpeg", encoded(4000, 3000, "JPEG")) for i in range(3)])
    tab.wait("document.querySelectorAll('#images li').length === 3")
    ask(tab, "say ok")
    sizes = [Image.open(io.BytesIO(image)).size for image in images(first.asked[0][1])]
    tokens = sum(round(w / 28) * round(h / 28) for w, h in sizes)  # as Qwen2-VL's processor rounds
    assert 0.8 * first.length < tokens < first.length - 256


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
def test_a_format_that_servers_refuse_is_sent_as_png(setting: Setting, kind: str) -> None:
    first, _, tab = setting(beside=False)
    drop(tab, ("a", f"image/{kind.lower()}", encoded(40, 30, kind, "red")))
    tab.wait("document.querySelectorAll('#images li').length === 1")
    ask(tab, "say ok")
    (sent,) = images(first.asked[0][1])
    image = Image.open(io.BytesIO(sent))
    assert (image.format, image.size, image.convert("RGB").getpixel((1, 1))) == ("PNG", (40, 30), (255, 0, 0))


def test_an_image_too_heavy_for_the_guard_is_made_lighter(setting: Setting) -> None:
    noise = Image.effect_noise((600, 600), 90)
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    first, _, tab = setting(Limits(max_image_bytes=60_000), beside=False)
    drop(tab, ("noise.png", "image/png", buffer.getvalue()))
    tab.wait("document.querySelectorAll('#images li').length === 1")
    ask(tab, "say ok")
    (sent,) = images(first.asked[0][1])
    assert len(buffer.getvalue()) > 200_000 and len(sent) <= 60_000


def test_what_is_no_image_and_one_too_many_are_refused_by_name(setting: Setting) -> None:
    _, _, tab = setting(Limits(max_images=2), beside=False)
    problem = tab.page.get_by_role("alert")
    drop(tab, ("notes.txt", "text/plain", b"hello"))
    tab.wait("!document.querySelector('#problem').hidden")
    assert problem.inner_text() == "notes.txt is not an image that this browser can read."
    drop(tab, *[(f"{i}.png", "image/png", encoded(30, 30)) for i in range(3)])
    tab.wait("document.querySelectorAll('#images li').length === 2")
    tab.wait("document.querySelector('#problem').textContent.includes('takes 2 images')")
    ask(tab, "say ok")
    drop(tab, ("3.png", "image/png", encoded(30, 30)))  # the conversation holds two already
    tab.wait("document.querySelector('#problem').textContent.includes('takes 2 images')")


def test_settings_out_of_range_are_pointed_at(setting: Setting) -> None:
    first, _, tab = setting(Limits(max_tokens=100), beside=False)
    assert tab.page.locator("#max-tokens").input_value() == "100"
    for field, value, word in [("max-tokens", "101", "from 1 to 100"), ("temperature", "3", "from 0 to 2")]:
        tab.page.locator("#settings").evaluate("e => { e.open = true; }")
        before = tab.page.locator(f"#{field}").input_value()
        tab.page.locator(f"#{field}").fill(value)
        tab.page.locator("#settings").evaluate("e => { e.open = false; }")
        tab.page.get_by_label("Question", exact=True).fill("say ok")
        tab.page.keyboard.press("Enter")
        assert word in tab.page.get_by_role("alert").inner_text()
        assert tab.evaluate("document.activeElement.id") == field
        tab.page.locator(f"#{field}").fill(before)
    tab.page.get_by_label("Question", exact=True).fill("  ")
    tab.page.keyboard.press("Enter")
    assert "Write a question" in tab.page.get_by_role("alert").inner_text() and not first.asked


def test_a_pasted_image_counts(setting: Setting) -> None:
    first, _, tab = setting(beside=False)
    tab.evaluate(
        """(content) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            transfer.items.add(new File([bytes], "", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, cancelable: true}));
        }""",
        base64.b64encode(encoded(20, 20)).decode(),
    )
    tab.wait("document.querySelectorAll('#images li').length === 1")
    assert "Pasted image" in tab.page.locator("#images").inner_text()
    ask(tab, "say ok")
    assert len(images(first.asked[0][1])) == 1


def test_all_of_it_by_keyboard(setting: Setting, tmp_path: Path) -> None:
    first, _, tab = setting(own=True)
    image = tmp_path / "cat.png"
    image.write_bytes(encoded(30, 30))
    keyboard = tab.page.keyboard
    visited: list[str] = []
    tab.page.on("filechooser", lambda chooser: chooser.set_files(image))

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(25):
            keyboard.press(key)
            label = "e => e.getAttribute('aria-label') ?? e.labels?.[0]?.textContent ?? e.textContent"
            visited.append(tab.page.evaluate_handle("document.activeElement").evaluate(label).strip())
            style = "getComputedStyle(document.activeElement).outlineStyle"
            assert tab.evaluate(style) != "none", f"{visited[-1]} shows no focus"
            if visited[-1] == name:
                return
        pytest.fail(f"{name} is not reached: {visited}")

    tab_to("Choose images")
    keyboard.press("Enter")
    tab.wait("document.querySelectorAll('#images li').length === 1")
    tab_to("Remove cat.png", "Shift+Tab")
    keyboard.press("Enter")
    tab.wait("document.querySelectorAll('#images li').length === 0")
    assert tab.evaluate("document.activeElement.id") == "choose"
    tab_to("Use the sample")
    keyboard.press("Enter")
    tab.wait("document.activeElement.id === 'question'")
    assert tab.page.get_by_label("Question", exact=True).input_value()
    keyboard.press("Control+A")
    keyboard.type("slow")
    keyboard.press("Shift+Enter")
    keyboard.type("please")
    assert tab.page.get_by_label("Question", exact=True).input_value() == "slow\nplease"
    keyboard.press("Control+A")
    keyboard.type("slow")
    keyboard.press("Enter")
    tab.wait("document.querySelector('.text')?.textContent.length > 15")
    tab_to("Stop")
    keyboard.press("Enter")
    finished(tab)
    assert len(first.asked) == 1 and all("ERR_ABORTED" in problem for problem in tab.problems)  # what Stop does
    keyboard.press("Shift+Tab")
    assert tab.evaluate("document.activeElement.id") == "question"


def test_a_screen_reader_hears_each_answer_once(setting: Setting) -> None:
    _, _, tab = setting()
    tab.evaluate(
        """() => {
            window.heard = [];
            new MutationObserver(() => window.heard.push(document.querySelector('#status').textContent))
                .observe(document.querySelector('#status'), {childList: true, characterData: true, subtree: true});
        }"""
    )
    ask(tab, "say one two three four five six")
    heard = tab.evaluate("window.heard")
    assert heard == [
        "Asking.",
        "demo-awq: one two three four five six  demo: one two three four five six  Both answers are the same.",
    ]
    live = "[...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].map(e => e.id)"
    assert sorted(tab.evaluate(live)) == ["problem", "status"]


MARKDOWN = """# Totals

The **sum** is *not* `1 * 2`:

1. first
2. second
   - inner _one_
   - snake_case_name

| item | price |
|---|---:|
| tea \\| milk | 2.50 |

> quoted
> twice

```python
print("<b>")
```
[a link](https://example.com/x) ![an image](https://example.com/y.png)
<img src=x onerror=alert(1)>"""


def test_markdown_becomes_elements_and_html_stays_text(setting: Setting) -> None:
    first, _, tab = setting(beside=False)
    ask(tab, f"say {MARKDOWN}")
    shape = tab.evaluate(
        """() => {
            const inner = (e) => e.children.length ? `(${[...e.children].map(shown).join(' ')})` : '';
            const shown = (e) => e.localName + inner(e);
            return [...document.querySelector('.text').children].map(shown);
        }"""
    )
    assert shape == [
        "h4",
        "p(strong em code)",
        "ol(li li(ul(li(em) li)))",
        "div(table(thead(tr(th th)) tbody(tr(td td))))",
        "blockquote(p)",
        "pre(code)",
        "p",
    ]
    text = tab.evaluate("document.querySelector('.text').textContent")
    assert 'print("<b>")' in text and "<img src=x onerror=alert(1)>" in text and "snake_case_name" in text
    assert "tea | milk" in text and "[a link](https://example.com/x)" in text
    assert tab.accessibility_violations() == [] and tab.problems == []
    base = tab.page.url.removesuffix("play")
    assert all(url.startswith(base) for url in tab.requests)
    ask(tab, "say And now?")
    assert first.asked[-1][1]["messages"][1]["content"] == MARKDOWN  # the model gets back what it wrote


@pytest.mark.parametrize(
    "text",
    [
        "*" * 4000,
        "`" * 4001,
        "> " * 2000 + "x",
        "| " * 2000,
        "**a *b __c ~~d " * 300,
        "- " * 900 + "x",
        "# " + " " * 9000,
    ],
    ids=["stars", "ticks", "quotes", "pipes", "open marks", "lists", "blanks"],
)
def test_no_answer_takes_the_page_s_time(setting: Setting, text: str) -> None:
    _, _, tab = setting(beside=False)
    took = tab.evaluate(
        """async (text) => {
            const { blocks } = await import(new URL("play/markdown.js", document.baseURI).href);
            const began = performance.now();
            const made = blocks(text);
            return [performance.now() - began, made.map((e) => e.textContent).join("").length];
        }""",
        text,
    )
    assert took[0] < 5000 and took[1] > 0


def test_an_answer_is_copied_as_it_was_written(setting: Setting) -> None:
    _, _, tab = setting(beside=False, own=True)
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(tab, "say **bold** and `code`")
    tab.page.get_by_role("button", name="Copy the answer of demo-awq").click()
    tab.wait("document.querySelector('.copy').textContent === 'Copied'")
    assert tab.evaluate("navigator.clipboard.readText()") == "**bold** and `code`"
    assert tab.evaluate("document.querySelector('#status').textContent") == "Copied."


def test_earlier_questions_come_back(setting: Setting) -> None:
    _, _, tab = setting(beside=False)
    field = tab.page.get_by_label("Question", exact=True)
    assert not tab.page.get_by_text("Earlier questions").is_visible()
    for question in ("say one", "say two", "say one"):
        ask(tab, question)
    ask(tab, "refuse 400 no")
    field.fill("")
    for key, shown in [
        ("ArrowUp", "say one"),
        ("ArrowUp", "say two"),
        ("ArrowUp", "say two"),
        ("ArrowDown", "say one"),
    ]:
        field.press(key)
        assert field.input_value() == shown
    field.press("ArrowDown")
    assert field.input_value() == ""
    field.fill("my own")
    field.press("ArrowUp")
    assert field.input_value() == "my own"
    tab.page.reload()
    tab.wait("document.querySelector('#questions li')")
    tab.page.get_by_text("Earlier questions", exact=True).click()
    assert tab.page.locator("#questions li").all_inner_texts() == ["say one", "say two"]
    tab.page.get_by_role("button", name="say two").click()
    assert field.input_value() == "say two" and tab.evaluate("document.activeElement.id") == "question"
    tab.page.get_by_role("button", name="Forget them").click()
    assert not tab.page.get_by_text("Earlier questions", exact=True).is_visible()
    assert tab.evaluate("sessionStorage.length") == 0


def test_settings_close_by_button_and_escape(setting: Setting) -> None:
    _, _, tab = setting(beside=False)
    for leave in ("button", "Escape"):
        tab.page.get_by_text("Settings", exact=True).click()
        tab.page.get_by_label("Temperature").focus()
        if leave == "button":
            tab.page.get_by_role("button", name="Close settings").click()
        else:
            tab.page.keyboard.press(leave)
        assert tab.evaluate("[document.querySelector('#settings').open, document.activeElement.localName]") == [
            False,
            "summary",
        ]


def test_a_phone_offers_its_camera(setting: Setting) -> None:
    _, _, tab = setting(beside=False, width=390, phone=True)
    with tab.page.expect_file_chooser() as opened:
        tab.page.get_by_role("button", name="Take a photo").click()
    assert opened.value.element.get_attribute("capture") == "environment"
    opened.value.set_files({"name": "now.jpg", "mimeType": "image/jpeg", "buffer": encoded(40, 30, "JPEG")})
    tab.wait("document.querySelectorAll('#images li').length === 1")


def test_a_desktop_offers_no_camera(setting: Setting) -> None:
    _, _, tab = setting(beside=False)
    assert not tab.page.get_by_role("button", name="Take a photo").is_visible()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_axe_finds_nothing_in_any_state_and_nothing_overflows(setting: Setting, width: int) -> None:
    _, _, tab = setting(width=width, phone=width < 500)

    def check() -> None:
        for dark in (False, True):
            tab.dark(dark)
            assert tab.accessibility_violations() == [], dark
        assert tab.evaluate("document.documentElement.scrollWidth") == width

    check()
    tab.page.get_by_role("button", name="Use the sample").click()
    tab.wait("document.querySelectorAll('#images li').length === 1")
    check()
    ask(tab, f"say {'x' * 300}")
    ask(tab, f"say {MARKDOWN}")
    ask(tab, "refuse 400 " + "No. " * 40)
    for details in tab.page.locator("details").all():
        details.evaluate("e => { e.open = true; }")
    check()


def test_nothing_moves_for_those_who_ask_for_that(setting: Setting) -> None:
    _, _, tab = setting(reduced_motion=True, beside=False)
    tab.page.get_by_label("Question", exact=True).fill("slow")
    tab.page.keyboard.press("Enter")
    tab.wait("document.querySelector('.text')?.textContent.length > 4")
    last = "getComputedStyle(document.querySelector('.text > :last-child'), '::after')"
    assert tab.evaluate(f"[{last}.content !== 'none', {last}.animationName]") == [True, "none"]
    tab.page.get_by_role("button", name="Stop").click(delay=0)


def test_two_models_on_one_server_can_be_chosen_between(setting: Setting) -> None:
    first, _, tab = setting(beside=False)
    assert tab.page.locator("#choices select").count() == 0
    first.adapters = ["demo-awq-lora"]
    tab.page.reload()
    tab.page.get_by_text("Settings", exact=True).click()
    tab.page.get_by_label("Model of this server").select_option("demo-awq-lora")
    assert tab.page.locator("#sides").inner_text() == "demo-awq-lora"
    ask(tab, "say ok")
    assert first.asked[0][1]["model"] == "demo-awq-lora"
    assert "demo-awq-lora" in tab.page.locator(".answer h3").inner_text()
