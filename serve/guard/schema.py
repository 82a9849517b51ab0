"""JSON schemas of a request, and structural tags around them: what a grammar of them would cost, before one is made.

A grammar is compiled before the first token, in threads that all requests share, and goes on when its client has left.
What it costs is known from the schema: each string with bounds of its own, each pattern and each object of which some
properties must be there becomes states of an automaton, and every state is held against the whole vocabulary. So it is
the cost that is bounded, not the shape: the states of all schemas of a request (`Limits.max_schema_states`), and the
product of the bounds along any path through them. Measured on xgrammar 0.2.8: about a millisecond for a state and a
vocabulary of a thousand tokens.

A schema is walked as what it is: `pattern` is a keyword where a keyword can stand, and a name among `properties`. What
vLLM takes and then fails on (a bound below zero, a reference to itself with nothing between) is refused by its name.
"""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

from serve.guard.fields import refused_field
from serve.guard.parse import too_deep
from serve.http.errors import Refusal
from serve.settings.limits import Limits

__all__ = ["SchemaCost", "check_schemas"]

#: Characters of all JSON schemas of a request.
_MOST_CHARS = 20_000
#: Largest product of the bounds along one path: a list of 1,000 lists of 1,000 texts is held open at every token.
_MOST_PRODUCT = 1_000_000
#: A repetition is written out up to here and shared beyond.
_WRITTEN_OUT = 128

_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MORE_COUNTS = ("minContains", "maxContains")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
#: Keywords whose value is a schema, a list of them, or an object of them by name.
_ONE = (
    "additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not",
    "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "dependentSchemas", "properties")
#: Those that say something of the same value, so that a way round through them consumes nothing.
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")
#: Regular expressions as property names, and references that depend on the way to them: only slow compilers have them.
_REFUSED = ("patternProperties", "$dynamicRef", "$recursiveRef")


class SchemaCost:
    """What the schemas of one request cost, counted up.

    Attributes:
        states: of the grammars, so far.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._chars = 0
        self.states = 0.0

    def add_text(self, value: Any, param: str, depth: int = 1) -> None:
        """Count the characters of a value. Raises Refusal."""
        if depth > self._limits.max_json_depth:
            raise too_deep(self._limits)
        self._chars += len(value) + 2 if isinstance(value, str) else 4
        if self._chars > _MOST_CHARS:
            raise refused_field(f"JSON schemas of more than {_MOST_CHARS} characters are not taken.", param)
        if isinstance(value, dict):
            self._chars += sum(map(len, value))
            for each in value.values():
                self.add_text(each, param, depth + 1)
        elif isinstance(value, list):
            for each in value:
                self.add_text(each, param, depth + 1)

    def add_states(self, states: float, param: str) -> None:
        """Count states. Raises Refusal."""
        self.states += states
        if self.states > self._limits.max_schema_states:
            raise refused_field(
                "The JSON schemas ask for a grammar that takes long to compile: fewer different lengths, shorter "
                "patterns, or fewer properties that minProperties and maxProperties choose among.",
                param,
            )

    def check_product(self, product: int, param: str) -> None:
        """Refuse a product of bounds that is too large."""
        if product > _MOST_PRODUCT:
            raise refused_field(f"The JSON schemas' bounds multiply to more than {_MOST_PRODUCT}. Lower them.", param)


def check_schemas(request: dict[str, Any], limits: Limits) -> SchemaCost:
    """Return what the schemas of a request cost. Its fields have the types that they should have.

    Raises Refusal for what is no schema, can't be compiled, or costs too much.
    """
    try:
        return _check(request, limits)
    except RecursionError:  # references can lead deeper than a body nests
        raise too_deep(limits) from None


def _check(request: dict[str, Any], limits: Limits) -> SchemaCost:
    cost = SchemaCost(limits)
    if (response_format := request.get("response_format")) is not None:
        cost.add_text(response_format, "response_format")
        if response_format["type"] == "structural_tag":
            _Tags(cost).check(response_format)
        elif response_format["type"] == "json_schema":
            _Schema(response_format["json_schema"]["schema"], cost, "response_format").check()
    for tool in request.get("tools") or ():
        cost.add_text(tool, "tools")
        if (parameters := tool["function"].get("parameters")) is not None:
            _Schema(parameters, cost, "tools").check()
    return cost


class _Schema:
    """One schema document: what its references start from."""

    def __init__(self, root: dict[str, Any], cost: SchemaCost, param: str) -> None:
        self._root, self._cost, self._param = root, cost, param
        #: Bounds and patterns that are counted: the same again is the same automaton.
        self._seen: set[tuple[Any, ...]] = set()
        self._products: dict[int, int] = {}
        self._followed: set[int] = set()

    def check(self) -> int:
        """Check all of it; return the largest product of bounds."""
        self._walk(self._root)
        product = self._product(self._root)
        self._cost.check_product(product, self._param)
        return product

    def _refuse(self, message: str) -> Refusal:
        return refused_field(message, self._param)

    # ---- each schema by itself

    def _walk(self, schema: Any) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise self._refuse("A JSON schema is an object, true or false.")
        self._check_keywords(schema)
        self._count(schema)
        self._check_cycle(schema)
        for each in _inner(schema):
            self._walk(each)

    def _check_keywords(self, schema: dict[str, Any]) -> None:
        for name in _REFUSED:
            if name in schema:
                raise self._refuse(f"A JSON schema with {name} is not taken.")
        types = schema.get("type", [])
        if not all(
            isinstance(each, str) and each in _TYPES for each in (types if isinstance(types, list) else [types])
        ):
            raise self._refuse(f"A JSON schema's type is one of {', '.join(sorted(_TYPES))}.")
        for name in (*_COUNTS, *_MORE_COUNTS):
            if name in schema and (type(schema[name]) is not int or schema[name] < 0):
                raise self._refuse(f"A JSON schema's {name} must be a whole number of at least 0.")
        for name in _NUMBERS:
            value = schema.get(name, 1)
            # "exclusiveMinimum: true" is what draft 4 had
            if not (type(value) in (int, float) and abs(value) < 2**63) and not isinstance(value, bool):
                raise self._refuse(f"A JSON schema's {name} must be a number of at most 64 bits.")
        if not schema.get("multipleOf", 1) > 0:
            raise self._refuse("A JSON schema's multipleOf must be above 0.")
        for least, most in zip(_COUNTS[::2], _COUNTS[1::2], strict=True):
            if schema.get(least, 0) > schema.get(most, _MOST_PRODUCT**2):
                raise self._refuse(f"A JSON schema's {least} is above its {most}.")
        self._check_forms(schema)

    def _check_forms(self, schema: dict[str, Any]) -> None:
        """Refuse keywords whose value has not the form it should have."""
        for name in ("$ref", "format", "pattern"):
            if not isinstance(schema.get(name, ""), str):
                raise self._refuse(f"A JSON schema's {name} is a text.")
        for name in _LISTS:
            if name in schema and not (isinstance(schema[name], list) and schema[name]):
                raise self._refuse(f"A JSON schema's {name} is a list of at least one schema.")
        for name in _MAPS:
            if not isinstance(schema.get(name, {}), dict):
                raise self._refuse(f"A JSON schema's {name} is an object of schemas.")
        required = schema.get("required", [])
        # "required: true" is what draft 3 had, and means nothing today
        if not isinstance(required, bool) and not (
            isinstance(required, list) and all(isinstance(each, str) for each in required)
        ):
            raise self._refuse("A JSON schema's required is a list of names.")
        if not (isinstance(schema.get("enum", [0]), list) and schema.get("enum", [0])):
            raise self._refuse("A JSON schema's enum is a list of at least one value.")

    def _check_cycle(self, schema: dict[str, Any]) -> None:
        """Refuse a schema that leads back to itself with nothing between: no grammar has an end to it.

        Depth first, each schema of the document once; those on the way from `schema` are in `on_way`.
        """
        if id(schema) in self._followed:
            return
        way, on_way = [(schema, self._beside(schema))], {id(schema)}
        while way:
            here, open_ = way[-1]
            if not open_:
                way.pop()
                on_way.discard(id(here))
                self._followed.add(id(here))
                continue
            target = open_.pop()
            if id(target) in on_way:
                raise self._refuse("A JSON schema refers to itself with nothing between.")
            if id(target) not in self._followed:
                way.append((target, self._beside(target)))
                on_way.add(id(target))

    def _beside(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the schemas that say something of the same value."""
        targets = [self._target(schema["$ref"])] if isinstance(schema.get("$ref"), str) else []
        for name in _IN_PLACE:
            value = schema.get(name, [])
            targets += value if isinstance(value, list) else [value]
        return [target for target in targets if isinstance(target, dict)]

    def _target(self, reference: str) -> Any:
        """Return what a reference names."""
        here: Any = self._root
        if reference.startswith("#"):
            for part in filter(None, reference[1:].split("/")):
                name = part.replace("~1", "/").replace("~0", "~")
                if isinstance(here, list) and name.isascii() and name.isdigit() and len(name) < 6:
                    here = here[int(name)] if int(name) < len(here) else None
                else:
                    here = here.get(name) if isinstance(here, dict) else None
            if isinstance(here, dict | bool):
                return here
        raise self._refuse("A JSON schema's $ref must name a part of the same schema: #/$defs/NAME.")

    # ---- what it costs

    def _count(self, schema: dict[str, Any]) -> None:
        self._cost.add_states(1, self._param)
        lengths = (schema.get("minLength", 0), schema.get("maxLength", 0), schema.get("format"))
        if any(lengths):
            bound = min(max(lengths[0], lengths[1]), _WRITTEN_OUT)
            self._once(("length", *lengths), bound + (20 if lengths[2] else 0))
        if "pattern" in schema:
            self._once(("pattern", schema["pattern"]), self._pattern_states(schema["pattern"]))
        literals = [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]
        if literals:
            self._cost.add_states(len(json.dumps(literals)) / 32, self._param)
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        needed = len(properties.keys() & set(required)) if isinstance(required, list) else 0
        if schema.get("minProperties", 0) > needed or schema.get("maxProperties", len(properties)) < len(properties):
            # each property at each count of those before it
            self._cost.add_states((len(properties) - needed) ** 2 / 4, self._param)

    def _once(self, what: tuple[Any, ...], states: float) -> None:
        if what not in self._seen:
            self._seen.add(what)
            self._cost.add_states(states, self._param)

    def _pattern_states(self, pattern: str) -> float:
        try:
            return 2 * pattern_states(pattern)
        except (re.error, OverflowError, RecursionError, ValueError):
            raise self._refuse("A JSON schema's pattern is no regular expression that is taken.") from None

    def _product(self, schema: Any) -> int:
        """Return the largest product of bounds along a path; a way back counts once."""
        if not isinstance(schema, dict):
            return 1
        known = self._products.get(id(schema))
        if known is not None:
            return known
        self._products[id(schema)] = 1
        inner = [self._product(each) for each in _inner(schema)]
        if "$ref" in schema:
            inner.append(self._product(self._target(schema["$ref"])))
        bounds = [schema.get(name, 0) for name in _COUNTS]
        items, properties = max(bounds[2:4]), max(bounds[4:6])
        product: int = max([1, *bounds[:2], max(1, items, properties) * max([1, *inner])])
        self._products[id(schema)] = product
        return product


def _inner(schema: dict[str, Any]) -> list[Any]:
    """Return the schemas right inside a schema."""
    found: list[Any] = []
    for name in _ONE:
        if name in schema:
            value = schema[name]
            found += value if name == "items" and isinstance(value, list) else [value]
    for name in _LISTS:
        found += schema.get(name, [])
    for name in _MAPS:
        found += schema.get(name, {}).values()
    # What draft 7 called dependencies names either properties or a schema.
    dependencies = schema.get("dependencies", {})
    found += (
        [each for each in dependencies.values() if isinstance(each, dict)] if isinstance(dependencies, dict) else []
    )
    return found


def pattern_states(pattern: str) -> int:
    """Return the states of a regular expression's automaton, repetitions written out.

    Raises re.error and its kin for one that Python does not read; JavaScript's own inventions are few.
    """
    from re import _parser  # type: ignore[attr-defined]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsed = _parser.parse(pattern)
    return _states(parsed)


def _states(parsed: Any) -> int:
    total = 0
    for kind, value in parsed:
        name = str(kind)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = value
            total += max(int(least), int(most) if int(most) < 2**31 else 0, 1) * _states(inner)
        elif name == "SUBPATTERN":
            total += _states(value[-1])
        elif name == "ATOMIC_GROUP":
            total += _states(value)
        elif name == "BRANCH":
            total += sum(_states(each) for each in value[1])
        elif name in ("ASSERT", "ASSERT_NOT", "GROUPREF", "GROUPREF_EXISTS"):
            raise ValueError(name)  # what no automaton has
        elif name != "AT":
            total += 1
        if total > _MOST_PRODUCT:
            raise OverflowError
    return max(total, 1)


#: Structural tags: what holds other formats, under which names.
_TAG_INSIDE = {
    "or": ("elements",),
    "optional": ("content",),
    "plus": ("content",),
    "repeat": ("content",),
    "sequence": ("elements",),
    "star": ("content",),
    "tag": ("content",),
    "tags_with_separator": ("tags",),
    "triggered_tags": ("tags",),
}
_TAG_LEAVES = ("any_text", "const_string", "json_schema", "qwen_xml_parameter", "regex")


class _Tags:
    """A structural tag: texts, and schemas between them."""

    def __init__(self, cost: SchemaCost) -> None:
        self._cost = cost

    def check(self, value: dict[str, Any]) -> None:
        """Check the tag that is a response_format."""
        if isinstance(value.get("structures"), list):  # vLLM's older form
            for structure in value["structures"]:
                schema = structure.get("schema") if isinstance(structure, dict) else None
                if not isinstance(schema, dict):
                    raise self._refuse(
                        'A structure of a structural tag is {"begin": ..., "schema": {...}, "end": ...}.'
                    )
                _Schema(schema, self._cost, "response_format").check()
        else:
            self._cost.check_product(self._format(value.get("format")), "response_format")

    @staticmethod
    def _refuse(message: str) -> Refusal:
        return refused_field(message, "response_format")

    def _format(self, value: Any) -> int:
        """Check a format and return the product of its bounds."""
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or (kind not in _TAG_INSIDE and kind not in _TAG_LEAVES):
            known = ", ".join(sorted({*_TAG_INSIDE, *_TAG_LEAVES}))
            raise self._refuse(f"A format of a structural tag is not taken: its type must be one of {known}.")
        self._cost.add_states(1, "response_format")
        times: int = 1
        for name in ("min", "max", "max_chars", "max_tokens", "max_whitespace_cnt"):
            count = value.get(name)
            if count is None or (name == "max" and count == -1):
                continue
            if type(count) is not int or count < 0:
                raise self._refuse(f"A structural tag's {name} must be a whole number of at least 0.")
            times = max(times, int(count))
        if kind == "repeat" and 0 <= value.get("max", -1) < value.get("min", 0):
            raise self._refuse("A structural tag's min is above its max.")
        if times > 1:
            self._cost.add_states(min(times, _WRITTEN_OUT), "response_format")
        inner = self._inner(kind, value)
        return max([times, *(times * each for each in inner)])

    def _inner(self, kind: str, value: dict[str, Any]) -> list[int]:
        if kind in ("json_schema", "qwen_xml_parameter"):
            schema = value.get("json_schema")
            return [_Schema(schema, self._cost, "response_format").check()] if isinstance(schema, dict) else []
        if kind == "regex":
            _Schema({"pattern": value.get("pattern")}, self._cost, "response_format").check()
            return []
        products: list[int] = []
        for name in _TAG_INSIDE.get(kind, ()):
            inside = value.get(name)
            for each in inside if isinstance(inside, list) else [inside]:
                # a tag among tags need not say what it is
                tag = {"type": "tag", **each} if name == "tags" and isinstance(each, dict) else each
                products.append(self._format(tag))
        return products
