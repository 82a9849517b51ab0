"""What JSON schemas cost, and where a keyword stands. The slow ones are measured in serve.guard.schema's own words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.guard.schema import check_schemas, pattern_states
from serve.http.errors import Refusal
from serve.settings.limits import Limits

LIMITS = Limits()


def in_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def in_tool(schema: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}


def tag(format: Any) -> dict[str, Any]:
    return {"response_format": {"type": "structural_tag", "format": format}}


def refused(request: dict[str, Any]) -> str:
    with pytest.raises(Refusal) as caught:
        check_schemas(request, LIMITS)
    assert (caught.value.status, caught.value.reason) == (400, "field")
    return caught.value.message


def strings(number: int, least: int) -> dict[str, Any]:
    return {"properties": {f"k{i}": {"type": "string", "maxLength": least + i} for i in range(number)}}


BOTH = pytest.mark.parametrize("place", [in_format, in_tool])


@BOTH
@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"k{i}": {"type": "string"} for i in range(300)}, "minProperties": 151},
        {"properties": {f"k{i}": {"type": "string"} for i in range(300)}, "minProperties": 1},
        {"properties": {f"k{i}": {"type": "string"} for i in range(300)}, "maxProperties": 150},
        {"anyOf": [{"type": "string", "minLength": k, "maxLength": 997} for k in range(300)]},
        {"anyOf": [{"type": "string", "minLength": k} for k in range(100, 200)]},
        strings(20, 500),
        {"items": {"items": {"maxLength": 10}, "maxItems": 1000}, "maxItems": 1000},
        {"$defs": {"b": {"minItems": 5000}}, "items": {"$ref": "#/$defs/b"}, "minItems": 5000},
        {"type": "string", "pattern": "^(.{1,500}x){1,500}$"},
        {"type": "string", "pattern": "^.{0,1000}$"},
        {"type": "array", "maxItems": 10**9},
    ],
    ids=range(11),
)  # fmt: skip
def test_what_takes_long_to_compile_is_refused(place: Any, schema: dict[str, Any]) -> None:
    assert any(word in refused(place(schema)) for word in ("takes long to compile", "multiply", "pattern"))


@BOTH
@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"type": "string", "minLength": -5},
        {"type": "string", "minLength": 5, "maxLength": 2},
        {"$ref": "#/$defs/nowhere"},
        {"$ref": "http://127.0.0.1/schema"},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"},
        {"allOf": [{"$ref": "#"}]},
        {"minItems": 1.5},
        {"maxItems": True},
        {"maxProperties": "3"},
        {"type": "strnig"},
        {"type": ["string", 1]},
        {"anyOf": []},
        {"properties": []},
        {"properties": {"a": 1}},
        {"required": "a"},
        {"enum": []},
        {"minimum": 2**70},
        {"minimum": "1"},
        {"multipleOf": 0},
        {"pattern": "("},
        {"pattern": "(?=a)b"},
        {"pattern": "(a)\\1"},
        {"pattern": 1},
        {"format": []},
        {"patternProperties": {"^a": {}}},
        {"items": 1},
    ],
    ids=json.dumps,
)
def test_what_can_be_no_grammar_is_the_clients_mistake(place: Any, schema: dict[str, Any]) -> None:
    refused(place(schema))


KEYWORDS = (
    "pattern", "patternProperties", "$ref", "format", "maxLength", "minLength", "minItems", "maxItems", "type", "enum",
    "anyOf", "items", "required", "properties", "$defs", "const", "minProperties", "additionalProperties",
)  # fmt: skip


@BOTH
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"pattern": {"type": "string"}, "path": {"type": "string"}}},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        {"type": "string", "maxLength": 2000},
        {"type": "object", "properties": {name: {"type": "string"} for name in KEYWORDS}, "required": list(KEYWORDS)},
        {"$defs": {name: {"type": "string"} for name in KEYWORDS}, "properties": {"a": {"$ref": "#/$defs/pattern"}}},
        {"enum": [{"pattern": 1, "minLength": -5, "$ref": "#"}], "default": {"maxItems": 10**9}},
        {"const": {"patternProperties": 1}, "examples": [{"$ref": 5}], "description": "^a$", "title": "x"},
        {"type": "array", "maxItems": 100, "items": {"type": "string", "maxLength": 100}},
        {"type": "array", "maxItems": 50, "items": strings(5, 20)},
        {"type": ["string", "null"], "format": "date-time"},
        {"$defs": {"n": {"properties": {"c": {"items": {"$ref": "#/$defs/n"}}}}}, "$ref": "#/$defs/n"},
        {"properties": {f"k{i}": {"maxLength": 500} for i in range(100)}},
        {"properties": {"a": {}, "b": {}}, "minProperties": 1, "additionalProperties": False},
        {"anyOf": [{"type": "integer", "minimum": 0, "exclusiveMaximum": 10}, True]},
    ],
    ids=range(14),
)  # fmt: skip
def test_ordinary_schemas_are_taken(place: Any, schema: dict[str, Any]) -> None:
    check_schemas(place(schema), LIMITS)


@pytest.mark.parametrize(
    "format",
    [
        {"type": "grammar", "grammar": "root ::= root 'a'"},
        {"type": "sequence", "elements": [{"type": "grammar", "grammar": "root ::= root"}]},
        {"type": "repeat", "min": 1, "max": 10**7, "content": {"type": "any_text"}},
        {"type": "repeat", "min": 5000, "max": -1, "content": {"type": "repeat", "min": 5000, "max": -1,
         "content": {"type": "any_text"}}},
        {"type": "repeat", "min": -1, "max": 5, "content": {"type": "any_text"}},
        {"type": "repeat", "min": 5, "max": 2, "content": {"type": "any_text"}},
        {"type": "token", "token": 151644},
        {"type": "any_tokens"},
        {"type": "regex", "pattern": "(.{1,500}x){1,500}"},
        {"type": "json_schema", "json_schema": {"$ref": "#"}},
        {"type": "triggered_tags", "triggers": ["<"], "tags": [{"begin": "<", "content": {"type": "grammar"}}]},
        {"type": []},
        [],
        None,
    ],
    ids=range(14),
)  # fmt: skip
def test_structural_tags_with_grammars_and_large_repeats_are_refused(format: Any) -> None:
    refused(tag(format))


def test_structural_tags_around_schemas_are_taken() -> None:
    inside = {"type": "json_schema", "json_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    tags = [{"type": "tag", "begin": "<f>", "content": inside, "end": "</f>"}]
    check_schemas(tag({"type": "triggered_tags", "triggers": ["<f>"], "tags": tags}), LIMITS)
    check_schemas(tag({"type": "sequence", "elements": [{"type": "const_string", "value": "a"}, inside]}), LIMITS)
    old = {"structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}], "triggers": ["<f>"]}
    check_schemas({"response_format": {"type": "structural_tag", **old}}, LIMITS)
    old["structures"] = [{"begin": "<f>", "schema": {"$ref": "#"}, "end": "</f>"}]
    refused({"response_format": {"type": "structural_tag", **old}})


def test_a_long_way_of_references_is_too_deep_or_followed() -> None:
    for number in (40, 700):
        chain: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(number)}
        schema = {"$defs": chain | {f"a{number}": {"type": "string"}}, "$ref": "#/$defs/a0"}
        try:
            check_schemas(in_format(schema), LIMITS)
        except Refusal as refusal:
            assert refusal.reason == "too_deep" and number > 500
    schema["$defs"][f"a{number}"] = {"$ref": "#/$defs/a3"}
    with pytest.raises(Refusal, match="itself"):
        check_schemas(in_format(schema), LIMITS)


def test_references_that_meet_again_are_no_way_round() -> None:
    """Many ways through the same schemas: each schema is followed once, or this would not end."""
    layers: dict[str, Any] = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 8} for i in range(60)}
    schema = {"$defs": layers | {"a60": {"type": "string"}}, "$ref": "#/$defs/a0"}
    check_schemas(in_format(schema), LIMITS)


def test_all_schemas_of_a_request_share_one_budget() -> None:
    tools = [in_tool(strings(5, 100 + 10 * i))["tools"][0] for i in range(2)]
    check_schemas({"tools": tools}, LIMITS)
    refused({"tools": tools * 3})
    refused({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 21_000}}]})
    assert check_schemas(in_format(strings(20, 500)), Limits(max_schema_states=5000)).states > 1500


@pytest.mark.parametrize(
    ("schema", "states"),
    [
        ({"type": "string"}, 1),
        ({"type": "string", "maxLength": 50}, 51),
        ({"type": "string", "maxLength": 2000}, 129),
        ({"type": "string", "minLength": 100}, 101),
        ({"type": "string", "pattern": "^[a-z]{2,10}$"}, 21),
        ({"properties": {f"k{i}": {} for i in range(20)}, "minProperties": 1}, 1 + 20 + 100),
        ({"properties": {f"k{i}": {} for i in range(20)}, "required": [f"k{i}" for i in range(10)],
          "maxProperties": 12}, 1 + 20 + 25),
        ({"properties": {f"k{i}": {} for i in range(20)}, "minProperties": 0, "maxProperties": 20}, 21),
    ],
)  # fmt: skip
def test_states_are_counted_as_the_guide_says(schema: dict[str, Any], states: int) -> None:
    assert check_schemas(in_format(schema), LIMITS).states == states


def test_the_same_bounds_are_one_automaton() -> None:
    same = {"properties": {f"k{i}": {"maxLength": 500} for i in range(50)}}
    assert check_schemas(in_format(same), LIMITS).states < 200


@pytest.mark.parametrize(
    ("pattern", "states"),
    [("abc", 3), ("^[a-z]{5}$", 5), ("(ab|c)*", 3), ("(a{1,10}b){2,3}", 33), ("a{3,}", 3), ("", 1), ("(?:x?)+", 1)],
)
def test_states_of_a_pattern(pattern: str, states: int) -> None:
    assert pattern_states(pattern) == states


SCHEMAS = st.recursive(
    st.sampled_from([{}, True, {"type": "string"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"enum": [1]}, 1, None]),
    lambda inner: st.dictionaries(
        st.sampled_from(["items", "anyOf", "properties", "$defs", "minLength", "maxItems", "not", "a", "required"]),
        inner | st.lists(inner, max_size=2) | st.integers(-2, 2000),
        max_size=3,
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(SCHEMAS)
def test_any_schema_is_taken_or_refused(schema: Any) -> None:
    if isinstance(schema, dict):
        for request in (in_format(schema), in_tool(schema), tag(schema)):
            try:
                check_schemas(request, LIMITS)
            except Refusal as refusal:
                assert refusal.status == 400
