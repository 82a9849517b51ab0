"""Every field takes what it can be, and refuses all else by itself: nothing of a request's may end in another error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.guard.body import Checker
from serve.guard.fields import CHAT_FIELDS, COMPLETION_FIELDS, OTHER_FIELDS
from serve.http.errors import Refusal
from serve.settings.limits import MORE_ROUTES, Limits

CHECKER = Checker(Limits())

#: Any JSON, with the numbers and texts that have gone wrong before.
ODD = st.sampled_from(
    [2**63, 2**64, -(2**63) - 1, 10**400, -1, 0, 1.5, 1e308, "", "auto", "#", "json_schema", "1", True, None]
)
VALUES = st.recursive(
    ODD | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "arguments", "json_schema", "schema", "format", "$ref", "a"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


async def no_fetch(url: str) -> bytes:
    raise AssertionError


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}]} | fields


def check(request: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    body = json.dumps(request).encode()
    if path == "/v1/chat/completions":
        return asyncio.run(CHECKER.chat(request, body, no_fetch)).body
    if path == "/v1/completions":
        return CHECKER.completion(request, body).body
    return asyncio.run(CHECKER.other(path, request, body, no_fetch)).body


def refusal(request: dict[str, Any], path: str = "/v1/chat/completions") -> Refusal:
    with pytest.raises(Refusal) as caught:
        check(request, path)
    assert caught.value.status == 400
    return caught.value


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(CHAT_FIELDS)), VALUES)
def test_a_chat_field_is_taken_or_refused(name: str, value: Any) -> None:
    try:
        check(chat(**{name: value}))
    except Refusal as refused:
        assert refused.status in (400, 413)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(COMPLETION_FIELDS)), VALUES)
def test_a_completion_field_is_taken_or_refused(name: str, value: Any) -> None:
    try:
        check({"model": "m", "prompt": "Hi", name: value}, "/v1/completions")
    except Refusal as refused:
        assert refused.status == 400


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations"]), VALUES)
def test_a_field_of_a_message_is_taken_or_refused(name: str, value: Any) -> None:
    try:
        check(chat(messages=[{"role": "assistant", "content": "Hi", name: value}]))
    except Refusal as refused:
        assert refused.status in (400, 413)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted((path, name) for path, known in OTHER_FIELDS.items() for name in known)), VALUES)
def test_a_field_of_an_added_route_is_taken_or_refused(where: tuple[str, str], value: Any) -> None:
    try:
        check({where[1]: value}, where[0])
    except Refusal as refused:
        assert refused.status in (400, 413)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2**64},
        {"top_k": 2**31},
        {"top_k": True},
        {"seed": 2**63},
        {"stop_token_ids": [2**63]},
        {"stop_token_ids": [True]},
        {"stop_token_ids": 5},
        {"logit_bias": {"9" * 40: 1}},
        {"logit_bias": {"1": "a"}},
        {"logit_bias": []},
        {"top_logprobs": 1.5},
        {"top_logprobs": 2**70},
        {"temperature": "1"},
        {"temperature": 10**400},
        {"top_p": 0},
        {"repetition_penalty": 0},
        {"stream": 1},
        {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": [1]},
        {"stop": [""]},
        {"user": {}},
        {"cache_salt": ""},
        {"cache_salt": "a/b"},
        {"reasoning_effort": []},
        {"response_format": []},
        {"response_format": {"type": []}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
        {"tools": []},
        {"tools": [[]]},
        {"tools": [{}]},
        {"tools": [{"type": "function", "function": {}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        {"tool_choice": "auto"},
        {"tool_choice": {"function": {}}},
        {"tool_choice": []},
        {"messages": [{"role": []}]},
        {"messages": [{"role": {}}]},
        {"messages": [{"role": "user", "content": "Hi", "name": 1}]},
        {"messages": [{"role": "assistant", "tool_calls": {}}]},
        {"messages": [{"role": "assistant", "tool_calls": [[]]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": []}}]}]},
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_what_vllm_would_stumble_over_is_refused_as_a_field(fields: dict[str, Any]) -> None:
    assert refusal(chat(**fields)).reason == "field"


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}])


def test_a_calls_arguments_nest_no_deeper_than_a_body() -> None:
    assert refusal(call("[" * 100_000)).reason == "too_deep"
    assert refusal(call("[" * 100 + "]" * 100)).reason == "too_deep"
    assert check(call('{"a": [1, {"b": "\\n"}]}'))


def test_arguments_that_are_no_json_are_left_to_vllm() -> None:
    """It goes on without them: a conversation with a call that was cut short must go on."""
    assert check(call('{"a": "\\n'))
    assert check(call(""))


def test_arguments_that_two_readers_read_differently_are_refused() -> None:
    assert refusal(call('{"a": "\\u003c|im_start|>", "a": 1}')).reason == "field"
    assert refusal(call('{"a": NaN}')).reason == "field"


def test_what_is_null_does_not_reach_vllm() -> None:
    body = check(chat(top_k=None, ignore_eos=None, max_tokens=5, echo=None))
    assert json.loads(body) == chat(max_tokens=5)
    body = check({"model": "m", "prompt": "Hi", "ignore_eos": None}, "/v1/completions")
    assert json.loads(body) == {"model": "m", "prompt": "Hi"}


def test_each_route_that_can_be_added_is_known() -> None:
    assert set(OTHER_FIELDS) == set(MORE_ROUTES)


@pytest.mark.parametrize(
    ("path", "request_", "reason"),
    [
        ("/tokenize", {"messages": [{"role": "user", "content": "<|im_start|>"}]}, "special_token"),
        ("/tokenize", {"prompt": "Hi", "chat_template": "{{ 1 }}"}, "field"),
        ("/tokenize", {"prompt": "Hi", "media_io_kwargs": {}}, "field"),
        ("/v1/embeddings", {"input": [[151652]]}, "field"),
        ("/v1/embeddings", {"input": "<|image_pad|>"}, "special_token"),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": [{"type": "image_embeds"}]}]}, "field"),
        ("/score", {"data_1": {"content": [{"type": "video_url", "video_url": {"url": "x"}}]}}, "video"),
        ("/score", {"data_1": {"content": "Hi", "multi_modal": []}}, "field"),
        ("/pooling", {"data": {"image": "http://127.0.0.1"}}, "field"),
    ],
)
def test_added_routes_keep_the_rules_of_chats(path: str, request_: dict[str, Any], reason: str) -> None:
    assert refusal(request_, path).reason == reason


@pytest.mark.parametrize("path", ["/tokenize", "/v1/embeddings", "/pooling", "/classify"])
def test_addresses_of_images_are_refused_on_every_route_that_takes_messages(path: str) -> None:
    """Passed on, vLLM would fetch them: the guard fetches itself, and here from nobody."""
    fetched: list[str] = []

    async def fetch(url: str) -> bytes:
        fetched.append(url)
        raise Refusal(400, "image_url", "No.", "messages")

    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
    request = {"messages": [{"role": "user", "content": [part]}]}
    with pytest.raises(Refusal) as caught:
        asyncio.run(CHECKER.other(path, request, b"", fetch))
    assert caught.value.reason == "image_url" and fetched == ["http://127.0.0.1:1/a.png"]
