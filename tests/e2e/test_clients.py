"""Clients that people have, unchanged, against the real server behind the guard; and the examples of docs/clients.md.

Where a grammar is asked for, white space is biased away: the grammar allows it anywhere, and the embedded model, which
knows no JSON, would write nothing else until it is cut off.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.e2e.conftest import Guarded, Question
from tests.support.forked import fork, wait
from tests.support.paths import ROOT
from toolkit.paths import demo_checkpoint

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI

#: On one worker with the others that need these two servers.
pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("guarded")]

MODEL = "demo-awq"
SHAPES = ROOT / "docs/images/shapes.png"
VOCABULARY: dict[str, int] = json.loads((demo_checkpoint() / "tokenizer.json").read_text())["model"]["vocab"]
#: As the API has it: token id to bias. The tokenizer writes space, line break, return and tab as Ġ, Ċ, č and ĉ.
NO_BLANKS = {str(number): -100 for token, number in VOCABULARY.items() if not token.strip("ĠĊčĉ")}
HOW_MANY = "How many shapes are in the picture?"


@pytest.fixture
def client(guarded: Guarded) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.key, max_retries=0, timeout=120) as opened:
        yield opened


def data_url(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"


def asking(question: str, *images: Path, **fields: str) -> list[Any]:
    """A user's message with images; `fields` go beside each image's URL."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image), **fields}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


# ---- the guide ------------------------------------------------------------------------------------------------


def examples() -> list[tuple[str, str, str]]:
    """Language, code and expected output of each example in docs/clients.md."""
    page = (ROOT / "docs/clients.md").read_text()
    return re.findall(r"```(python|bash)\n((?:(?!```).)*)```\n\n```text\n(.*?)```", page, re.DOTALL)


_WITHOUT_BLANKS = """
import functools, openai.resources.chat.completions as c
for name in ("create", "parse"):
    setattr(c.Completions, name, functools.partialmethod(getattr(c.Completions, name), logit_bias={}))
"""


def run(code: str, printed: Path, environment: dict[str, str]) -> None:
    """Be the program, which prints into a file."""
    os.environ.clear()
    os.environ.update(environment)
    with printed.open("w") as sys.stdout:
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(code, "example", "exec", dont_inherit=True), vars(sys.modules["__main__"]))


@pytest.mark.parametrize("number", range(len(examples())))
def test_each_example_of_the_guide_prints_what_it_says(
    guarded: Guarded, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language, code, expected = examples()[number]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"OPENAI_BASE_URL": f"{guarded.url}/v1", "OPENAI_API_KEY": guarded.key}
    if "tools=" in code or "response_format=" in code:
        code = f"{_WITHOUT_BLANKS.format(NO_BLANKS)}\n{code}"
    monkeypatch.chdir(ROOT)
    printed = tmp_path / "printed"
    if language == "python":  # in a copy of this process, where what it imports is imported
        assert wait(fork(run, code, printed, environment)) == 0
    else:
        with printed.open("w") as output:
            subprocess.run(["bash", "-ec", code], env=environment, stdout=output, timeout=180, check=True)
    assert printed.read_text() == expected


def test_the_example_script_asks_with_openai_s_client(guarded: Guarded) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"OPENAI_BASE_URL": f"{guarded.url}/v1", "OPENAI_API_KEY": guarded.key}
    command = [sys.executable, "examples/ask.py", str(SHAPES), HOW_MANY]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert re.fullmatch(r"5\ndemo-awq: \d+ tokens in, \d+ out\n", ran.stdout), ran.stdout + ran.stderr


def test_the_guide_shows_every_client() -> None:
    shown = "".join(code for _, code, _ in examples())
    assert len(examples()) >= 9
    for client in (
        "OpenAI()",
        "AsyncOpenAI()",
        "ChatOpenAI(",
        "httpx.stream",
        "curl",
        ".parse(",
        "tools=",
        "stream=True",
    ):
        assert client in shown, client


# ---- openai ---------------------------------------------------------------------------------------------------


def test_streamed_and_whole_answers_are_the_same(client: OpenAI, questions: list[Question]) -> None:
    for question in questions[::8]:
        settings: dict[str, Any] = {
            "model": MODEL,
            "messages": asking(question.question, question.image),
            "temperature": 0,
            "max_tokens": 32,
        }
        whole = client.chat.completions.create(**settings)
        text, usage, reasons = "", None, []
        for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons += [choice.finish_reason] if choice.finish_reason else []
        assert text == whole.choices[0].message.content and text
        assert usage == whole.usage and usage is not None
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert reasons == [whole.choices[0].finish_reason] == ["stop"]


@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_detail_is_taken_and_changes_nothing(client: OpenAI, detail: str) -> None:
    answers = {
        client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
        .choices[0]
        .message.content
        for messages in (asking(HOW_MANY, SHAPES), asking(HOW_MANY, SHAPES, detail=detail))
    }
    assert answers == {"5"}


def test_several_images_and_turns(client: OpenAI, questions: list[Question]) -> None:
    first, second = [question for question in questions if question.task == "counting"][:2]
    one = client.chat.completions.create(model=MODEL, messages=asking("Look.", first.image), max_tokens=8)
    two = client.chat.completions.create(model=MODEL, messages=asking("Look.", first.image, second.image), max_tokens=8)
    assert one.usage and two.usage and two.usage.prompt_tokens > one.usage.prompt_tokens + 4
    turns = [
        {"role": "system", "content": "Answer briefly."},
        *asking(HOW_MANY, SHAPES),
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "Are you sure?"},
    ]
    third = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=8)  # type: ignore[arg-type]
    assert third.choices[0].message.role == "assistant"


def test_n_seed_and_stop(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "messages": asking(HOW_MANY, SHAPES), "max_tokens": 12}
    several = client.chat.completions.create(**settings, n=3, temperature=1.5, seed=7)
    again = client.chat.completions.create(**settings, n=3, temperature=1.5, seed=7)
    texts = [choice.message.content for choice in several.choices]
    assert len(texts) == 3 and [choice.message.content for choice in again.choices] == texts
    listing = asking("List the labels and values of the bars.", ROOT / "serve/page/sample.png")
    cut = client.chat.completions.create(model=MODEL, messages=listing, temperature=0, max_tokens=40, stop=[","])
    assert cut.choices[0].message.content == "A 35" and cut.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(model=MODEL, messages=listing, temperature=0, max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage and short.usage.completion_tokens == 2


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=asking(HOW_MANY, SHAPES), temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content
    first = logprobs.content[0]
    assert first.token == "5" and first.logprob <= 0 and len(first.top_logprobs) == 3
    assert first.top_logprobs[0].token == first.token  # greedy
    assert sorted((top.logprob for top in first.top_logprobs), reverse=True) == [t.logprob for t in first.top_logprobs]


def test_models_and_plain_completions(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.completions.create(model=MODEL, prompt="one two", max_tokens=4)
    assert answer.usage and answer.usage.completion_tokens <= 4


class Shape(BaseModel):
    colour: Literal["red", "green", "blue"]
    shape: Literal["circle", "square"]
    sure: bool


def test_json_by_schema_streamed_and_not(client: OpenAI) -> None:
    schema = {"name": "shape", "strict": True, "schema": Shape.model_json_schema() | {"additionalProperties": False}}
    settings: dict[str, Any] = {
        "model": MODEL,
        "messages": asking("What is in the picture?", SHAPES),
        "response_format": {"type": "json_schema", "json_schema": schema},
        "temperature": 0,
        "max_tokens": 80,
        "logit_bias": NO_BLANKS,
    }
    whole = client.chat.completions.create(**settings).choices[0].message.content
    assert whole
    Shape.model_validate_json(whole)
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**settings, stream=True)
    )
    Shape.model_validate_json(streamed)
    parsed = client.chat.completions.parse(**{**settings, "response_format": Shape}).choices[0].message.parsed
    assert isinstance(parsed, Shape)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint a shape",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}, "times": {"enum": [1, 2]}},
            "required": ["colour", "times"],
            "additionalProperties": False,
        },
    },
}


def valid(arguments: str) -> bool:
    found = json.loads(arguments)
    return set(found) == {"colour", "times"} and found["colour"] in ("red", "green") and found["times"] in (1, 2)


def test_a_named_tool_gets_valid_arguments(client: OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": MODEL,
        "messages": asking("Paint it.", SHAPES),
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "paint"}},
        "temperature": 0,
        "max_tokens": 120,
        "logit_bias": NO_BLANKS,
    }
    (call,) = client.chat.completions.create(**settings).choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "paint" and call.id and valid(call.function.arguments)
    names, arguments = [], ""
    for chunk in client.chat.completions.create(**settings, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.function
            names += [delta.function.name] if delta.function.name else []
            arguments += delta.function.arguments or ""
    assert names == ["paint"] and valid(arguments)
    told = [
        *settings["messages"],
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "painted"},
    ]
    after = client.chat.completions.create(model=MODEL, messages=told, tools=[TOOL], tool_choice="none", max_tokens=8)
    assert after.choices[0].message.tool_calls in (None, [])


def test_required_and_automatic_tools(client: OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": MODEL,
        "messages": asking("Paint it.", SHAPES),
        "tools": [TOOL],
        "logit_bias": NO_BLANKS,
        "temperature": 0,
    }
    required = client.chat.completions.create(**settings, tool_choice="required", max_tokens=200)
    calls = required.choices[0].message.tool_calls or []
    assert calls and all(c.type == "function" and c.function.name == "paint" for c in calls)
    assert all(c.type == "function" and valid(c.function.arguments) for c in calls)
    automatic = client.chat.completions.create(**settings, max_tokens=8)
    assert automatic.choices[0].message.content  # too small a model to call any


def test_many_at_once_through_the_async_client(guarded: Guarded, questions: list[Question]) -> None:
    async def main() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{guarded.url}/v1", api_key=guarded.key, timeout=120) as client:

            async def one(question: Question) -> str | None:
                messages = asking(question.question, question.image)
                answer = await client.chat.completions.create(
                    model=MODEL, messages=messages, temperature=0, max_tokens=16
                )
                return answer.choices[0].message.content

            return await asyncio.gather(*map(one, questions[::3]))

    answers = asyncio.run(main())
    right = sum(a in q.answers for a, q in zip(answers, questions[::3], strict=True))
    assert right >= 0.7 * len(answers), answers


# ---- errors ---------------------------------------------------------------------------------------------------


def test_errors_are_openai_s_own_exceptions(client: OpenAI, guarded: Guarded) -> None:
    hello: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.AuthenticationError) as refused:
        OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong").chat.completions.create(model=MODEL, messages=hello)
    assert refused.value.status_code == 401 and refused.value.code == "key"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=hello)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="Hello", encoding_format="float")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model=MODEL, messages=hello, max_tokens=10**9)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=hello, extra_body={"mm_processor_kwargs": {}})
    assert bad.value.param == "mm_processor_kwargs" and bad.value.type == "invalid_request_error"
    no_image: Any = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}
    ]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=no_image)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=hello, stream=True, temperature=-1)


def test_too_many_at_once_are_told_so_and_try_again_by_themselves(guarded: Guarded) -> None:
    async def main(retries: int) -> list[Any]:
        url = f"{guarded.narrow_url}/v1"
        async with AsyncOpenAI(base_url=url, api_key=guarded.key, max_retries=retries, timeout=120) as client:
            asked = [
                client.chat.completions.create(
                    model="demo",
                    messages=[{"role": "user", "content": "Hello"}],
                    max_tokens=24,
                    extra_body={"ignore_eos": True},
                )
                for _ in range(8)
            ]
            return await asyncio.gather(*asked, return_exceptions=True)

    at_once = asyncio.run(main(0))
    refused = [answer for answer in at_once if isinstance(answer, openai.RateLimitError)]
    assert 0 < len(refused) < 8 and len(refused) + sum(not isinstance(a, Exception) for a in at_once) == 8
    assert int(refused[0].response.headers["retry-after"]) >= 1 and refused[0].code == "concurrency"
    patient = asyncio.run(main(60))
    assert [answer for answer in patient if isinstance(answer, Exception)] == []


# ---- LangChain, curl ------------------------------------------------------------------------------------------


@pytest.fixture
def chain(guarded: Guarded) -> ChatOpenAI:
    from langchain_openai import ChatOpenAI  # some seconds of imports

    return ChatOpenAI(
        model=MODEL,
        base_url=f"{guarded.url}/v1",
        api_key=guarded.key,
        temperature=0,
        max_tokens=120,
        timeout=120,
        logit_bias={int(number): bias for number, bias in NO_BLANKS.items()},
    )


@pytest.mark.parametrize("shape", ["image_url", "image"])
def test_langchain_s_image_messages(chain: ChatOpenAI, shape: str) -> None:
    from langchain_core.messages import HumanMessage

    encoded = base64.b64encode(SHAPES.read_bytes()).decode()
    image: dict[str, Any] = {
        "image_url": {"type": "image_url", "image_url": {"url": data_url(SHAPES), "detail": "auto"}},
        "image": {"type": "image", "base64": encoded, "mime_type": "image/png"},
    }[shape]
    message = HumanMessage(content=[{"type": "text", "text": HOW_MANY}, image])
    answer = chain.invoke([message])
    assert answer.content == "5" and answer.usage_metadata and answer.usage_metadata["output_tokens"] >= 1
    assert "".join(str(chunk.content) for chunk in chain.stream([message])) == "5"


def test_langchain_s_structured_output_and_tools(chain: ChatOpenAI) -> None:
    from langchain_core.messages import HumanMessage

    message = HumanMessage(content=asking("What is in the picture?", SHAPES)[0]["content"])
    assert isinstance(chain.with_structured_output(Shape, method="json_schema").invoke([message]), Shape)
    (call, *_) = chain.bind_tools([TOOL], tool_choice="paint", strict=True).invoke([message]).tool_calls  # type: ignore[attr-defined]
    assert call["name"] == "paint" and valid(json.dumps(call["args"]))


def test_curl_streams(guarded: Guarded, tmp_path: Path) -> None:
    body = {"model": MODEL, "messages": asking(HOW_MANY, SHAPES), "temperature": 0, "stream": True}
    file = tmp_path / "body.json"
    file.write_text(json.dumps(body))
    command = ["curl", "-sSN", "--noproxy", "*", f"{guarded.url}/v1/chat/completions", "--data-binary", f"@{file}"]
    command += ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {guarded.key}"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    text = "".join(choice["delta"].get("content") or "" for e in events for choice in json.loads(e)["choices"])
    assert text == "5"


def test_httpx_without_any_package_of_openai_s(guarded: Guarded) -> None:
    body = {"model": MODEL, "messages": asking(HOW_MANY, SHAPES), "temperature": 0}
    headers = {"Authorization": f"Bearer {guarded.key}"}
    answer = httpx.post(f"{guarded.url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)
    assert answer.json()["choices"][0]["message"]["content"] == "5"
