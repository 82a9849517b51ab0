"""What the guard takes of JSON schemas and xgrammar reads, xgrammar compiles and follows: none of it fails in vLLM."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.guard.schema import check_schemas
from serve.http.errors import Refusal
from serve.settings.limits import Limits

pytestmark = pytest.mark.slow  # importing xgrammar takes seconds

NAMES = st.sampled_from(["a", "b", "pattern"])
LEAVES = st.sampled_from(
    [{}, True, False, {"type": "string"}, {"type": "integer"}, {"enum": [1, "x"]}, {"const": None}, {"$ref": "#"},
     {"$ref": "#/$defs/a"}, {"type": "string", "pattern": "^a{2,3}|[^b]$"}, {"type": "string", "format": "date"}]
)  # fmt: skip
COUNTS = st.sampled_from([0, 1, 2, 5, 40])


def keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects of a few keywords each, with what may stand there."""
    values: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from(["string", "object", "array", "number", ["string", "null"]]),
        "required": st.lists(NAMES, max_size=2, unique=True),
        "minimum": st.sampled_from([0, -5, 1.5, 2**62]),
    }
    values |= dict.fromkeys(("properties", "$defs"), st.dictionaries(NAMES, inner, max_size=3))
    values |= dict.fromkeys(("items", "additionalProperties", "not", "propertyNames"), inner)
    values |= dict.fromkeys(("anyOf", "allOf", "prefixItems"), st.lists(inner, min_size=1, max_size=3))
    bounds = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
    values |= dict.fromkeys(bounds, COUNTS)
    return st.fixed_dictionaries({}, optional=values)


SCHEMAS = keywords(st.recursive(LEAVES, keywords, max_leaves=5))


@pytest.fixture(scope="module")
def compiler() -> Any:
    xgrammar = pytest.importorskip("xgrammar")
    vocabulary = [bytes([byte]) for byte in range(1, 256)] + [b"ab", b'{"', b'":', b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[len(vocabulary) - 1])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS)
def test_what_is_taken_can_be_compiled(schema: dict[str, Any], compiler: Any) -> None:
    import xgrammar

    request = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    text = json.dumps(schema)
    try:
        check_schemas(request, Limits())
        xgrammar.Grammar.from_json_schema(text)  # vLLM does this before it takes a request, and answers 400
    except (Refusal, RuntimeError):
        return
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(text))
    matcher.fill_next_token_bitmask(xgrammar.allocate_token_bitmask(1, 259))
