"""Which fields a request may have, and what type and range each has, but for texts, images and schemas.

vLLM takes far more fields than OpenAI's API has, and ignores those it does not know; docs/security.md lists both sides.
What it takes it reads leniently, and some of it without looking: a number past 64 bits, or a list where a text should
be, ends in an error of the server's. So every field is held here against what it can be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from typing import Any

from serve.http.errors import Refusal
from serve.settings.limits import Limits

__all__ = [
    "CHAT_FIELDS",
    "COMPLETION_FIELDS",
    "OTHER_FIELDS",
    "check_answers",
    "check_fields",
    "check_message",
    "check_other",
    "check_values",
    "refused_field",
    "whole_number",
]

#: Entries of a list or object: each of them costs work for every token, or on every request.
_MOST_ENTRIES = {"stop": 16, "stop_token_ids": 64, "logit_bias": 300, "tools": 128, "messages": 1024}
#: Token ids and counts are 32-bit numbers in vLLM's tensors, a seed is one of 64 bits.
_INT32, _INT64 = 2**31 - 1, 2**63 - 1
#: vLLM writes a name that it does not know into its log.
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/@+-]{0,255}")
_TOKEN_ID = re.compile(r"[0-9]{1,9}")
_ROLES = ("assistant", "developer", "system", "tool", "user")
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations"})

#: Refuses a value that is not what the field can be; is given the field's name.
_Check = Callable[[Any, str], None]


def refused_field(message: str, param: str) -> Refusal:
    """Return the refusal of a field; `param` names it."""
    return Refusal(400, "field", message, param)


def _require(holds: bool, message: str, param: str) -> None:
    if not holds:
        raise refused_field(message, param)


def _whole(least: int, most: int) -> _Check:
    def check(value: Any, name: str) -> None:
        _require(type(value) is int, f"{name} must be a whole number.", name)
        _require(least <= value <= most, f"{name} must be from {least} to {most}.", name)

    return check


def _number(least: float, most: float, *, above: bool = False) -> _Check:
    """Take a number of a range; `above`: the least is not itself in it."""

    def check(value: Any, name: str) -> None:
        _require(type(value) in (int, float), f"{name} must be a number.", name)
        inside = least <= value <= most and not (above and value == least)
        _require(inside, f"{name} must be {'above' if above else 'from'} {least:g} {'up ' * above}to {most:g}.", name)

    return check


def _one_of(*values: str) -> _Check:
    def check(value: Any, name: str) -> None:
        _require(isinstance(value, str) and value in values, f"{name} must be one of {', '.join(values)}.", name)

    return check


def _flag(value: Any, name: str) -> None:
    _require(isinstance(value, bool), f"{name} must be true or false.", name)


def _text(value: Any, name: str) -> None:
    _require(isinstance(value, str), f"{name} must be a text.", name)


def _anything(value: Any, name: str) -> None:
    """vLLM ignores it."""


def _model(value: Any, name: str) -> None:
    known = isinstance(value, str) and _MODEL.fullmatch(value)
    _require(bool(known), "model must be the name of a model that /v1/models lists.", name)


def _stop(value: Any, name: str) -> None:
    texts = value if isinstance(value, list) else [value]
    good = all(isinstance(text, str) and text for text in texts)
    _require(good, "stop must be a text or a list of texts, none of them empty.", name)


def _token_ids(value: Any, name: str) -> None:
    good = isinstance(value, list) and all(type(each) is int and 0 <= each <= _INT32 for each in value)
    _require(good, f"{name} must be a list of token ids.", name)


def _logit_bias(value: Any, name: str) -> None:
    good = isinstance(value, dict) and all(
        _TOKEN_ID.fullmatch(token) and type(bias) in (int, float) and -100 <= bias <= 100
        for token, bias in value.items()
    )
    _require(good, "logit_bias must be an object of token ids and numbers from -100 to 100.", name)


def _stream_options(value: Any, name: str) -> None:
    good = isinstance(value, dict) and all(
        option in ("include_usage", "continuous_usage_stats") and (flag is None or isinstance(flag, bool))
        for option, flag in value.items()
    )
    _require(good, "stream_options holds include_usage and continuous_usage_stats, each true or false.", name)


def _cache_salt(value: Any, name: str) -> None:
    good = isinstance(value, str) and 1 <= len(value) <= 128 and not set(value) & set("@/\\\0")
    _require(good, "cache_salt must be a text of 1 to 128 characters without @, / and \\.", name)


def _response_format(value: Any, name: str) -> None:
    _require(isinstance(value, dict), "response_format must be an object.", name)
    _one_of(*_FORMATS)(value.get("type"), "response_format.type")
    schema = value.get("json_schema")
    if value["type"] != "json_schema" and schema is None:
        return
    good = isinstance(schema, dict) and isinstance(schema.get("name"), str) and isinstance(schema.get("schema"), dict)
    _require(good, 'A response_format has its schema as {"json_schema": {"name": ..., "schema": {...}}}.', name)
    assert isinstance(schema, dict)
    _optional(schema, {"description": _text, "strict": _flag}, name)


def _tools(value: Any, name: str) -> None:
    _require(isinstance(value, list) and bool(value), "tools must be a list of at least one tool.", name)
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else {}
        good = isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])
        _require(good, 'A tool is given as {"type": "function", "function": {"name": ...}}.', name)
        assert isinstance(function, dict)
        known: dict[str, _Check] = {"description": _text, "strict": _flag, "defer_loading": _flag}
        _optional(function, known, name)
        _optional(tool, {"defer_loading": _flag}, name)
        parameters = function.get("parameters")
        _require(parameters is None or isinstance(parameters, dict), "A tool's parameters are a JSON schema.", name)


def _optional(value: dict[str, Any], checks: dict[str, _Check], param: str) -> None:
    """Check what of an object is there and not null."""
    for name, check in checks.items():
        if value.get(name) is not None:
            try:
                check(value[name], name)
            except Refusal as refusal:
                raise refused_field(refusal.message, param) from None


def _tool_choice(value: Any, name: str) -> None:
    if isinstance(value, dict):
        function = value.get("function") if value.get("type", "function") == "function" else None
        good = isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])
    else:
        good = isinstance(value, str) and value in ("none", "auto", "required")
    _require(good, "tool_choice must be none, auto, required or name a function.", name)


#: What both endpoints take: OpenAI's fields; of vLLM's own those that only choose among the tokens of the answer, and
#: the salt with which a client keeps its prompts' cache to itself.
_SAMPLING: dict[str, _Check] = {
    "cache_salt": _cache_salt,
    "frequency_penalty": _number(-2, 2),
    "ignore_eos": _flag,
    "include_stop_str_in_output": _flag,
    "logit_bias": _logit_bias,
    "max_tokens": _anything,  # `_amounts` looks at these three
    "min_p": _number(0, 1),
    "min_tokens": _anything,
    "model": _model,
    "n": _whole(1, _INT32),
    "presence_penalty": _number(-2, 2),
    "repetition_penalty": _number(0, 100, above=True),
    "response_format": _response_format,
    "seed": _whole(-_INT64 - 1, _INT64),
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "stop": _stop,
    "stop_token_ids": _token_ids,
    "stream": _flag,
    "stream_options": _stream_options,
    "temperature": _number(0, 2),
    "top_k": _whole(-1, _INT32),
    "top_p": _number(0, 1, above=True),
    "user": _text,
}
#: Fields of OpenAI's API that vLLM ignores and clients send all the same.
_IGNORED: dict[str, _Check] = dict.fromkeys(
    ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "verbosity"), _anything
)
_CHAT: dict[str, _Check] = {
    "logprobs": _flag,
    "max_completion_tokens": _anything,
    "messages": _anything,  # `check_message` looks at each
    "parallel_tool_calls": _flag,
    "reasoning_effort": _one_of(*_EFFORTS),
    "tool_choice": _tool_choice,
    "return_token_ids": _flag,  # of one's own prompt and answer
    "return_tokens_as_token_ids": _flag,
    "tools": _tools,
    "top_logprobs": _whole(-1, _INT32),
}
_COMPLETION: dict[str, _Check] = {
    "logprobs": _whole(-1, _INT32),
    "prompt": _anything,
    "suffix": _text,
}
_CHECKS = {True: _SAMPLING | _CHAT, False: _SAMPLING | _COMPLETION}
CHAT_FIELDS = frozenset(_SAMPLING | _IGNORED | _CHAT)
COMPLETION_FIELDS = frozenset(_SAMPLING | _IGNORED | _COMPLETION)


def _texts(value: Any, name: str) -> None:
    good = isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
    _require(good, f"{name} must be a text or a list of texts.", name)


def _documents(value: Any, name: str) -> None:
    for each in value if isinstance(value, list) else [value]:
        parts = isinstance(each, dict) and each.keys() == {"content"} and isinstance(each["content"], list)
        _require(isinstance(each, str) or parts, f'{name} must be texts, or {{"content": [parts]}}.', name)


def _messages(value: Any, name: str) -> None:
    good = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    _require(bool(good), "messages must be a list of at least one message.", name)


_NAMED: dict[str, _Check] = {"model": _model, "user": _text, "truncate_prompt_tokens": _whole(-1, _INT32)}
_POOLED: dict[str, _Check] = _NAMED | {
    "dimensions": _whole(1, _INT32),
    "encoding_format": _one_of("float", "base64"),
    "input": _texts,  # token ids could hold any control token
    "messages": _messages,
    "task": _text,
    "use_activation": _flag,
}
_SCORED: dict[str, _Check] = _NAMED | {"use_activation": _flag}
_SCORED |= dict.fromkeys(("data_1", "data_2", "documents", "items", "queries", "query", "text_1", "text_2"), _documents)
_RANKED: dict[str, _Check] = _SCORED | {"top_n": _whole(0, _INT32)}
#: What the routes take that `Limits.allow_routes` can add, see `serve.settings.limits.MORE_ROUTES`.
OTHER_FIELDS: dict[str, dict[str, _Check]] = {
    "/classify": _POOLED,
    "/detokenize": {"model": _model, "tokens": _token_ids},
    "/pooling": _POOLED,
    "/rerank": _RANKED,
    "/score": _SCORED,
    "/tokenize": {
        "add_generation_prompt": _flag,
        "add_special_tokens": _flag,
        "messages": _messages,
        "model": _model,
        "prompt": _text,
        "return_token_strs": _flag,
        "tools": _tools,
    },
    "/v1/embeddings": _POOLED,
    "/v1/rerank": _RANKED,
    "/v1/score": _SCORED,
    "/v2/rerank": _RANKED,
}


def check_other(path: str, request: dict[str, Any], allowed: Set[str]) -> None:
    """Refuse a request to an added route with a field that is not known, or one that is not what it can be."""
    checks = OTHER_FIELDS[path]
    check_fields(request, checks.keys() | allowed)
    for name, check in checks.items():
        if request.get(name) is not None:
            check(request[name], name)
    if len(request.get("messages") or ()) > _MOST_ENTRIES["messages"]:
        raise Refusal(400, "prompt_length", f"At most {_MOST_ENTRIES['messages']} messages are taken.", "messages")


def check_fields(request: dict[str, Any], known: Set[str]) -> None:
    """Refuse a request with a field that is not known."""
    if (unknown := _unknown(request, known)) is not None:
        raise refused_field(f"The field {unknown} is not taken by this server. Leave it out.", unknown)


def check_message(message: Any) -> None:
    """Refuse a message that is no object, has a field that is not known, or one that is not what it can be."""
    if not isinstance(message, dict):
        raise refused_field("A message must be an object.", "messages")
    if (unknown := _unknown(message, _MESSAGE_FIELDS)) is not None:
        raise refused_field(f"The field {unknown} of a message is not taken by this server.", "messages")
    role = message.get("role")
    good = isinstance(role, str) and role in _ROLES
    _require(good, f"A message's role must be one of {', '.join(_ROLES)}.", "messages")
    _optional(message, {"name": _text, "tool_call_id": _text, "refusal": _text}, "messages")
    if (calls := message.get("tool_calls")) is not None:
        _require(isinstance(calls, list), "A message's tool_calls must be a list.", "messages")
        for call in calls:
            _check_call(call)


def _check_call(call: Any) -> None:
    """Refuse a call of a tool that has not the form that clients get it in."""
    function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
    good = isinstance(function, dict) and isinstance(function.get("name"), str)
    form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'
    _require(good, f"A tool call is given as {form}.", "messages")
    assert isinstance(function, dict)
    _optional(call, {"id": _text, "index": _whole(0, _INT32)}, "messages")
    arguments = function.get("arguments")
    _require(arguments is None or isinstance(arguments, str | dict), "A tool call's arguments are a text.", "messages")


def check_values(request: dict[str, Any], limits: Limits, *, chat: bool) -> None:
    """Refuse values that their field can't have, lists that are too long, and too many tokens.

    Args:
        request: the body of a request to one of the endpoints.
        limits: the server's.
        chat: whether it is for /v1/chat/completions; else for /v1/completions.
    """
    for name, check in _CHECKS[chat].items():
        value = request.get(name)
        if value is None:
            continue
        most = _MOST_ENTRIES.get(name)
        if most is not None and isinstance(value, list | dict) and len(value) > most:
            reason = "prompt_length" if name == "messages" else "field"
            raise Refusal(400, reason, f"{name} has {len(value)} entries. At most {most} are taken.", name)
        check(value, name)
    _amounts(request, limits)
    _together(request)


def _amounts(request: dict[str, Any], limits: Limits) -> None:
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        asked, most = whole_number(request, name), limits.max_tokens
        if asked is not None and (asked > most or (asked == 0 and name != "min_tokens")):
            raise Refusal(400, "max_tokens", f"{name} must be from 1 to {most}.", name)


def _together(request: dict[str, Any]) -> None:
    """Refuse fields that ask for others which are not there."""
    choice, tools = request.get("tool_choice"), request.get("tools")
    if choice is not None and choice != "none":
        _require(tools is not None, "tool_choice is of no use without tools.", "tool_choice")
    if isinstance(choice, dict) and tools is not None:
        names = [tool["function"]["name"] for tool in tools]
        _require(choice["function"]["name"] in names, "tool_choice names none of the tools.", "tool_choice")
    if request.get("stream_options"):
        _require(request.get("stream") is True, "stream_options is for requests with stream: true.", "stream_options")


def check_answers(number: int, limits: Limits) -> None:
    """Refuse more answers than are given to one request."""
    if number > limits.max_n:
        raise Refusal(400, "n", f"At most {limits.max_n} answers are given to one request.", "n")


def whole_number(request: dict[str, Any], name: str) -> int | None:
    """Return a field's whole number, None for none. vLLM would take "100000" or 1e5 for one as well."""
    value = request.get(name)
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise refused_field(f"{name} must be a whole number.", name)
    return value


def _unknown(fields: dict[str, Any], known: Set[str]) -> str | None:
    """Return a field that is not known, as a message may show it. What is null is as good as absent: clients send back
    answers as they got them, with fields that were empty.
    """
    unknown = [name for name in fields.keys() - known if fields[name] is not None]
    if not unknown:
        return None
    name = min(unknown)
    return name if name.isidentifier() and len(name) <= 60 else "with a name that is none"
