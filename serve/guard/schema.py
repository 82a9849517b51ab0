"""Which fields a request may have, and what their values may be, but for texts and images.

vLLM takes far more fields than OpenAI's API has, and ignores those it does not know; docs/security.md lists both sides.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any

from serve.guard.parse import too_deep
from serve.http.errors import Refusal
from serve.settings.limits import Limits

__all__ = [
    "CHAT_FIELDS",
    "COMPLETION_FIELDS",
    "check_answers",
    "check_fields",
    "check_message",
    "check_values",
    "refused_field",
    "whole_number",
]

#: What both endpoints take: OpenAI's fields; of vLLM's own those that only choose among the tokens of the answer, and
#: the salt with which a client keeps its prompts' cache to itself.
_SAMPLING = {
    "cache_salt", "frequency_penalty", "ignore_eos", "include_stop_str_in_output", "logit_bias", "logprobs",
    "max_tokens", "min_p",
    "min_tokens", "model", "n", "presence_penalty", "repetition_penalty", "response_format", "seed",
    "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_token_ids", "stream", "stream_options",
    "temperature", "top_k", "top_p", "user",
}  # fmt: skip
#: Fields of OpenAI's API that vLLM ignores and clients send all the same.
_IGNORED = {
    "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "verbosity"
}  # fmt: skip
CHAT_FIELDS = frozenset(
    _SAMPLING | _IGNORED
    | {
        "max_completion_tokens", "messages", "parallel_tool_calls", "reasoning_effort", "tool_choice", "tools",
        "top_logprobs",
    }
)  # fmt: skip
COMPLETION_FIELDS = frozenset(_SAMPLING | _IGNORED | {"prompt", "suffix"})

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations"})
#: Entries of a list or object: each of them costs work for every token, or on every request.
_MOST_ENTRIES = {"stop": 16, "stop_token_ids": 64, "logit_bias": 300, "tools": 128, "messages": 1024}
#: Characters of all JSON schemas of a request. A grammar is compiled from them before the first token.
_MOST_SCHEMA_CHARS = 20_000
#: Largest bound in a schema: a grammar repeats what may come up to that often.
_MOST_REPEATS = 1000
_BOUNDS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
#: vLLM writes a name that it does not know into its log.
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/@+-]{0,255}")


def refused_field(message: str, param: str) -> Refusal:
    """Return the refusal of a field; `param` names it."""
    return Refusal(400, "field", message, param)


def check_fields(request: dict[str, Any], known: Set[str]) -> None:
    """Refuse a request with a field that is not known."""
    if (unknown := _unknown(request, known)) is not None:
        raise refused_field(f"The field {unknown} is not taken by this server. Leave it out.", unknown)


def check_message(message: Any) -> None:
    """Refuse a message that is no object, has a field that is not known, or a role that is none."""
    if not isinstance(message, dict):
        raise refused_field("A message must be an object.", "messages")
    if (unknown := _unknown(message, _MESSAGE_FIELDS)) is not None:
        raise refused_field(f"The field {unknown} of a message is not taken by this server.", "messages")
    if message.get("role") not in _ROLES:
        raise refused_field(f"A message's role must be one of {', '.join(sorted(_ROLES))}.", "messages")


def check_values(request: dict[str, Any], limits: Limits) -> None:
    """Refuse a model's name that can be none, lists that are too long, too many tokens, schemas that cost too much."""
    model = request.get("model")
    if model is not None and not (isinstance(model, str) and _MODEL.fullmatch(model)):
        raise refused_field("model must be the name of a model that /v1/models lists.", "model")
    for name, most in _MOST_ENTRIES.items():
        value = request.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            reason = "prompt_length" if name == "messages" else "field"
            raise Refusal(400, reason, f"{name} has {len(value)} entries. At most {most} are taken.", name)
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        asked, most = whole_number(request, name), limits.max_tokens
        if asked is not None and (asked > most or (asked == 0 and name != "min_tokens")):
            raise Refusal(400, "max_tokens", f"{name} must be from 1 to {most}.", name)
    schemas = [request.get("response_format"), request.get("tools")]
    if any(schemas):
        budget = [_MOST_SCHEMA_CHARS]
        for schema, name in zip(schemas, ("response_format", "tools"), strict=True):
            _check_schema(schema, name, budget, limits)


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


def _check_schema(value: Any, param: str, budget: list[int], limits: Limits, depth: int = 1) -> None:
    """Refuse a schema from which a grammar would take long to compile.

    Args:
        value: the schema, or a part of it.
        param: the request's field that it stands in.
        budget: characters that are left to all schemas of the request; one number, which is counted down.
        limits: how deep it may nest.
        depth: of `value` in the field.
    """
    if depth > limits.max_json_depth:
        raise too_deep(limits)
    budget[0] -= len(value) + 2 if isinstance(value, str) else 4
    if budget[0] < 0:
        raise refused_field(f"JSON schemas of more than {_MOST_SCHEMA_CHARS} characters are not taken.", param)
    if isinstance(value, dict):
        for name, each in value.items():
            if name in ("pattern", "patternProperties") and not isinstance(each, bool):
                raise refused_field(f"A JSON schema with {name} is not taken.", param)
            if name in _BOUNDS and isinstance(each, int | float) and each > _MOST_REPEATS:
                raise refused_field(f"A JSON schema with {name} above {_MOST_REPEATS} is not taken.", param)
            budget[0] -= len(name)
            _check_schema(each, param, budget, limits, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _check_schema(each, param, budget, limits, depth + 1)


def _unknown(fields: dict[str, Any], known: Set[str]) -> str | None:
    """Return a field that is not known, as a message may show it. What is null is as good as absent: clients send back
    answers as they got them, with fields that were empty.
    """
    unknown = [name for name in fields.keys() - known if fields[name] is not None]
    if not unknown:
        return None
    name = min(unknown)
    return name if name.isidentifier() and len(name) <= 60 else "with a name that is none"
