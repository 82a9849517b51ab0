from __future__ import annotations

import json
from typing import Any

import pytest

from serve.guard.fields import CHAT_FIELDS, COMPLETION_FIELDS
from serve.http.errors import error_response
from serve.settings.limits import REASONS, Limits
from tests.support.paths import DOCS
from toolkit.errors import ServerError


def test_settings_survive_the_way_through_the_environment() -> None:
    limits = Limits(api_key="k", image_hosts=("a.example", "b.example:8443"), max_images=3, rate_per_minute=1.5)
    assert Limits.loads(limits.dumps()) == limits


def test_absent_settings_keep_their_defaults() -> None:
    assert Limits.loads("{}") == Limits()


def test_a_key_is_not_shown() -> None:
    assert "hunter2" not in repr(Limits(api_key="hunter2"))


def test_without_keys_none_is_needed() -> None:
    assert not Limits().needs_key
    assert Limits(api_key="k").needs_key
    assert Limits(api_key_file="/keys").needs_key


@pytest.mark.parametrize(
    ("setting", "option"),
    [
        ({"max_body_bytes": 0}, "--max-body-bytes"),
        ({"max_image_pixels": -1}, "--max-image-pixels"),
        ({"request_seconds": 0}, "--request-timeout"),
        ({"request_seconds": float("nan")}, "--request-timeout"),
        ({"rate_per_minute": -1}, "--rate"),
        ({"allow_routes": ("/tokenize",)}, "--allow-route"),
        ({"allow_routes": ("DELETE /x",)}, "--allow-route"),
        ({"allow_routes": ("POST /v1/responses",)}, "--allow-route"),
        ({"allow_routes": ("POST /invocations",)}, "--allow-route"),
        ({"hosts": ("qvl.example.com:8000",)}, "--allow-host"),
        ({"hosts": ("*",)}, "--allow-host"),
        ({"max_schema_states": 0}, "--max-schema-states"),
        ({"max_decoded_pixels": -1}, "--max-decoded-pixels"),
        ({"max_connections": 0}, "--max-connections"),
        ({"max_address_connections": 0}, "--max-address-connections"),
        ({"cors_origins": ("*",)}, "--cors-origin"),
        ({"cors_origins": ("https://a.example/",)}, "--cors-origin"),
        ({"image_hosts": ("https://a.example",)}, "--image-host"),
        ({"image_hosts": ("*.example",)}, "--image-host"),
        ({"api_key": "k\n"}, "--api-key"),
        ({"api_key": ""}, "--api-key"),
    ],
)
def test_settings_that_cannot_be_name_their_option(setting: dict[str, Any], option: str) -> None:
    with pytest.raises(ServerError, match=option):
        Limits(**setting)


@pytest.mark.parametrize("text", ["", "[]", '{"unknown": 1}', '{"max_n": "many"}'])
def test_an_environment_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ServerError, match="QVL_GUARD"):
        Limits.loads(text)


def test_reasons_are_unique() -> None:
    assert len(set(REASONS)) == len(REASONS)


def test_errors_have_openais_shape() -> None:
    start, body = error_response(429, "Wait.", "rate_limit_error", "rate", "x", [(b"retry-after", b"3")])
    assert start["status"] == 429
    headers = dict(start["headers"])
    assert headers[b"retry-after"] == b"3" and headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(body["body"])
    expected = {"message": "Wait.", "type": "rate_limit_error", "param": "x", "code": "rate"}
    assert json.loads(body["body"]) == {"error": expected}


def test_the_guide_names_every_reason_option_and_field() -> None:
    guide = (DOCS / "security.md").read_text()
    options = {Limits.option(name) for name in Limits.model_fields if name != "special_tokens"}
    # "draining" is refused by `serve.app.ready`, not by the guard
    for name in (set(REASONS) - {"draining"}) | CHAT_FIELDS | COMPLETION_FIELDS - {"prompt", "suffix"}:
        assert f"`{name}`" in guide, name
    for option in options:
        assert option in guide, option
