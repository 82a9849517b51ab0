"""The JSON of a request's body, read more strictly than vLLM reads it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np

from serve.http.errors import Refusal
from serve.settings.limits import Limits

__all__ = ["parse", "parse_arguments", "too_deep"]


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in an object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float)


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """Return a body's JSON object.

    Stricter than vLLM's own reading: UTF-8 only, no NaN or Infinity, no name twice in an object (two readers could
    take different ones), nothing that is far more structure than text. Raises Refusal (body_json, too_deep).
    """
    # Base64 has neither commas nor backslashes; millions of them are millions of objects, made before any is looked at.
    if len(body) > 1 << 18 and _parts(body) > 4 * limits.max_prompt_chars:
        raise Refusal(400, "body_json", "The body's JSON has too many parts.")
    try:
        parsed = _DECODER.decode(body.decode("utf-8"))
    except RecursionError:
        raise too_deep(limits) from None
    except UnicodeDecodeError:
        raise Refusal(400, "body_json", "The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, "body_json", f"The body is not JSON: {error.msg} at {where}.") from None
    except ValueError as error:
        shown = str(error) if len(str(error)) < 60 else "a number is too large"
        raise Refusal(400, "body_json", f"The body is JSON that this server does not take: {shown}.") from None
    if not isinstance(parsed, dict):
        raise Refusal(400, "body_json", "The body must be a JSON object.")
    return parsed


def parse_arguments(text: str, limits: Limits) -> Any:
    """Return the JSON in a tool call's arguments, which are a text; None where they are no JSON.

    vLLM goes on with no arguments then: models write such calls, and a conversation with one in it must go on. What is
    JSON to it and not here is refused. Raises Refusal (field, too_deep).
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise too_deep(limits) from None
    except json.JSONDecodeError:
        return None
    except ValueError:
        message = "A tool call's arguments must be JSON without NaN, without a name twice and of numbers that can be."
        raise Refusal(400, "field", message, "messages") from None


def too_deep(limits: Limits) -> Refusal:
    """Return the refusal of a body that nests too deep."""
    return Refusal(400, "too_deep", f"The body nests deeper than {limits.max_json_depth} levels.")


def _parts(body: bytes) -> int:
    """Return the commas and backslashes in a body."""
    values = np.frombuffer(body, np.uint8)
    return int(np.count_nonzero(values == ord(","))) + int(np.count_nonzero(values == ord("\\")))
