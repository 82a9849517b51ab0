"""docs/security.md, sentence by sentence: what it says of the guard, and the test that fails when it is not so.

A sentence that is reworded has to be reworded here, by whoever looks whether its test still says the same.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

from serve.guard.fields import CHAT_FIELDS, COMPLETION_FIELDS
from tests.support.paths import DOCS

TESTS = DOCS.parent / "tests"
APP, COMPAT, FETCH = (
    f"integration/serve/{each}" for each in ("guard/test_app.py", "test_compat.py", "guard/test_fetch.py")
)
FIELDS, SCHEMA, BUDGET, HOSTS, IMAGES, KEYS, RATE = (
    f"unit/serve/guard/test_{each}.py" for each in ("fields", "schema", "budget", "hosts", "images", "keys", "rate")
)
HOSTILE, PLAY, LIMITS = (
    "e2e/test_hostile.py",
    "integration/serve/app/test_play.py",
    "unit/serve/settings/test_limits.py",
)
ATTRIBUTES, USAGE, CONFIG, REQUESTLOG = (
    "integration/serve/guard/test_key_attributes.py",
    "unit/serve/guard/test_usage.py",
    "unit/serve/settings/test_config.py",
    "unit/serve/app/test_requestlog.py",
)

#: Words of a sentence or row, the file of its test, the test.
PROMISES = [
    # the table
    (
        "4096 in all (`--max-connections`), 512 from one address",
        COMPAT,
        "test_connections_from_one_address_and_in_all_are_bounded",
    ),
    ("64 KiB, 10 s, well-formed HTTP/1.1", COMPAT, "test_one_long_header_is_refused_in_openais_shape"),
    ("64 KiB, 10 s, well-formed HTTP/1.1", COMPAT, "test_headers_that_do_not_come_end_the_connection"),
    ("64 KiB, 10 s, well-formed HTTP/1.1", COMPAT, "test_what_is_no_http_is_refused_in_openais_shape"),
    (
        "trailers and what stands between two chunks 64 KiB",
        COMPAT,
        "test_trailers_and_extensions_before_an_answer_are_bounded",
    ),
    (
        "`Host` is an address, a name of this machine or one of `--allow-host`",
        HOSTS,
        "test_addresses_and_names_of_this_machine_pass",
    ),
    ("`Origin` the server's own or one of `--cors-origin`", HOSTS, "test_the_servers_own_page_and_named_origins_pass"),
    ("`GET /health` and `GET /ready` answer to any", APP, "test_a_server_without_keys_answers_to_its_own_names_only"),
    ("on every route but `GET /health` and `GET /ready`", APP, "test_only_health_and_ready_are_open"),
    ("on every route but `GET /health` and `GET /ready`", HOSTILE, "test_every_route_of_vllm_needs_a_key"),
    ("`/v1/models` and `/v1/models/NAME`", APP, "test_one_model_can_be_asked_for"),
    ("more with `--allow-route 'POST /tokenize'`", APP, "test_fields_routes_and_videos_can_be_allowed"),
    ("the one that the route has; HEAD where GET is", APP, "test_only_health_and_ready_are_open"),
    ("a sixth of them at once", RATE, "test_never_more_than_the_rate_and_the_burst"),
    ("`--max-concurrency 256`", APP, "test_rates_and_concurrency_are_each_keys_own"),
    ("32 MiB (`--max-body-bytes`)", APP, "test_a_body_that_never_ends_is_cut"),
    ("20 s (`--body-seconds`)", APP, "test_a_body_that_does_not_come_ends_the_request"),
    ("`application/json`, not compressed", APP, "test_content_types"),
    (
        "UTF-8, one object, no NaN or Infinity, no name twice, no half surrogates, 48 levels",
        APP,
        "test_hostile_requests_are_refused_and_counted",
    ),
    ("each of its type and in its range", FIELDS, "test_a_chat_field_is_taken_or_refused"),
    (
        "`max_tokens` 4096 (`--max-tokens`; set where none is asked for)",
        APP,
        "test_a_limit_is_set_where_none_was_asked_for",
    ),
    ("100,000 characters of text (`--max-prompt-chars`)", APP, "test_limits_are_the_settings"),
    ("20,000 characters, 1500 states", SCHEMA, "test_all_schemas_of_a_request_share_one_budget"),
    ("bounds that multiply to 1,000,000", SCHEMA, "test_what_takes_long_to_compile_is_refused"),
    ("no references that lead nowhere or to themselves", SCHEMA, "test_what_can_be_no_grammar_is_the_clients_mistake"),
    ("8 (`--max-images`), 10 MiB each", APP, "test_limits_are_the_settings"),
    ("as declared (or `data:image;base64,`)", APP, "test_a_data_url_may_leave_the_type_to_the_bytes"),
    ("whole, with nothing behind", IMAGES, "test_a_file_that_goes_on_is_refused"),
    ("no PNG of 16 bits of gray", APP, "test_16_bits_of_gray_are_refused_for_the_reason_that_calibration_gives"),
    ("pixels being decoded, from admission to the first token", APP, "test_pixels_are_held_until_the_first_token_only"),
    ("one request alone is always let in", BUDGET, "test_a_request_alone_is_let_in_whatever_its_size"),
    ("none; hosts named with `--image-host`", FETCH, "test_without_a_list_nothing_is_fetched"),
    ("none; `--allow-video`", APP, "test_fields_routes_and_videos_can_be_allowed"),
    ("in a stream that has begun, a last event with the error", APP, "test_time_is_up_amid_a_stream"),
    ("504 `timeout`", APP, "test_time_is_up_before_the_first_byte"),
    # below it
    ("Every refusal has OpenAI's shape", APP, "test_hostile_requests_are_refused_and_counted"),
    ("counts in `qvl_refusals_total{reason}`", HOSTILE, "test_refusals_are_counted"),
    (
        "Of what was sent a refusal repeats a field's name where it is one, a control token of the list, and numbers",
        APP,
        "test_no_refusal_repeats_what_was_sent",
    ),
    ("It never repeats a text, an address, an image or a key", APP, "test_no_refusal_repeats_what_was_sent"),
    (
        "What only the model can judge, vLLM refuses in its own words",
        HOSTILE,
        "test_what_vllm_refuses_is_no_server_error",
    ),
    ("All of it takes well under a second", HOSTILE, "test_refused_within_a_second"),
    ("100 MB take as long as the line needs", HOSTILE, "test_a_body_of_100_megabytes"),
    # why
    ("a route that is not listed is not there", HOSTILE, "test_with_a_key_only_the_listed_routes_are_there"),
    ("The key is read from its header alone", HOSTILE, "test_a_key_in_the_query_is_no_key"),
    (
        "a connection is closed when its answer ends before its message does",
        COMPAT,
        "test_a_message_that_does_not_end_after_its_answer_holds_no_connection",
    ),
    (
        "a connection is closed when its answer ends before its message does",
        COMPAT,
        "test_what_follows_an_answer_on_its_message_ends_the_connection",
    ),
    ("when nothing of an answer is read for a minute", COMPAT, "test_a_client_that_reads_nothing_is_left"),
    ("when more than 16 requests wait on it", COMPAT, "test_requests_that_wait_on_one_connection_are_bounded"),
    ("trailers (which it takes for headers)", COMPAT, "test_a_trailer_is_no_header"),
    ("Where a key is asked for that gains nothing", APP, "test_with_keys_a_server_goes_by_any_name"),
    ("names are taken if they are `localhost`, the machine's own, or given", HOSTS, "test_other_names_are_refused"),
    ("A page's `Origin` must be the server's own", HOSTS, "test_pages_of_other_origins_are_refused"),
    (
        "reads size and frames out of the file's own structure, without decoding",
        IMAGES,
        "test_bombs_are_seen_without_being_unpacked",
    ),
    (
        "a file that is cut short, or that is also a script or an archive, is refused",
        IMAGES,
        "test_a_file_cut_anywhere_is_refused",
    ),
    (
        "JPEGs may be followed by padding and by further JPEGs",
        IMAGES,
        "test_a_jpeg_may_be_followed_by_padding_and_jpegs",
    ),
    ("more than 32 scans is refused", IMAGES, "test_a_jpeg_of_many_scans_is_refused"),
    (
        "What is damaged inside such a structure is for the decoder to find",
        HOSTILE,
        "test_an_image_of_garbage_is_no_server_error",
    ),
    ("TIFF, SVG, HEIC and the rest are refused by name", IMAGES, "test_other_formats_are_named"),
    (
        "what all requests have decoded at one time is bounded too",
        HOSTILE,
        "test_images_that_unpack_to_much_are_bounded_together",
    ),
    (
        "a quarter of the machine's memory or of the control group's limit",
        BUDGET,
        "test_pixels_follow_from_the_memory_there_is",
    ),
    ("The host must be on the list, by name", FETCH, "test_what_the_list_does_not_name_is_not_asked"),
    ("*every* address that it has must be public", FETCH, "test_addresses_that_are_not_public"),
    (
        "the connection goes to the very address that was checked",
        FETCH,
        "test_the_connection_goes_to_the_address_that_was_checked",
    ),
    ("each redirect is checked as the first address was", FETCH, "test_redirects_are_checked_like_the_first"),
    ("`file:` is never read", APP, "test_hostile_requests_are_refused_and_counted"),
    (
        "They are refused in every text that can become part of a prompt",
        APP,
        "test_hostile_requests_are_refused_and_counted",
    ),
    ("`stop` may hold them", APP, "test_what_common_clients_send_passes"),
    ("The marks of grounding", APP, "test_what_common_clients_send_passes"),
    ("each string with bounds of its own counts up to 128 states", SCHEMA, "test_states_are_counted_as_the_guide_says"),
    ("the same bounds again count once", SCHEMA, "test_the_same_bounds_are_one_automaton"),
    (
        "Of each key one new schema at a time is compiled",
        BUDGET,
        "test_one_new_schema_of_a_client_is_compiled_at_a_time",
    ),
    ("others of that key wait (up to 32)", BUDGET, "test_more_than_a_few_do_not_wait"),
    (
        "a client that leaves keeps its turn for 2 ms a state",
        BUDGET,
        "test_whoever_leaves_waits_no_longer_and_a_turn_given_up_lasts_as_its_grammar",
    ),
    ("goes on being compiled when its client has left", HOSTILE, "test_schemas_of_clients_that_left_hold_nobody_up"),
    ("a property may be called `pattern`", SCHEMA, "test_ordinary_schemas_are_taken"),
    (
        "structural tags with grammars or token ids in them",
        SCHEMA,
        "test_structural_tags_with_grammars_and_large_repeats_are_refused",
    ),
    ("texts and images keep the rules of chats", APP, "test_added_routes_refuse_what_chats_refuse"),
    ("of these every field is known", FIELDS, "test_each_route_that_can_be_added_is_known"),
    ("Only `prompt` of `/tokenize` may hold control tokens", FIELDS, "test_added_routes_keep_the_rules_of_chats"),
    ("can't be added", LIMITS, "test_settings_that_cannot_be_name_their_option"),
    ("Taken: OpenAI's own", LIMITS, "test_the_guide_names_every_reason_option_and_field"),
    (
        "A field that is null counts as absent, and vLLM does not see it",
        FIELDS,
        "test_what_is_null_does_not_reach_vllm",
    ),
    (
        "Each field has to be of its type and in its range",
        FIELDS,
        "test_what_vllm_would_stumble_over_is_refused_as_a_field",
    ),
    ("Arguments of calls nest no deeper than a body", FIELDS, "test_a_calls_arguments_nest_no_deeper_than_a_body"),
    ("where they are no JSON, vLLM goes on without them", FIELDS, "test_arguments_that_are_no_json_are_left_to_vllm"),
    ("Of a client's headers vLLM sees", APP, "test_headers_that_steer_the_engine_stay_outside"),
    ("the engine aborts the request at once", HOSTILE, "test_the_engine_lets_go_when_a_client_leaves"),
    ("to vLLM a second time", APP, "test_what_fails_before_its_first_token_is_tried_again_once"),
    ("that would fail again", APP, "test_a_schema_that_fails_is_not_tried_again"),
    ("16 times `--max-body-bytes`", APP, "test_bodies_held_at_one_time_are_bounded"),
    ("Pages of other origins get no answer they could read", APP, "test_pages_of_other_origins"),
    ("There are no websockets", APP, "test_websockets_are_refused_and_lifespans_passed"),
    ("No prompt, image, key or query string is logged", HOSTILE, "test_nothing_of_a_request_is_in_the_log"),
    # keys and what their lines say
    ("at most `--max-model-len`", CONFIG, "test_the_guards_longest_answer_fits_into_the_context"),
    ("so is one with an empty `QVL_API_KEY`", CONFIG, "test_an_empty_variable_opens_no_door"),
    ("damaged or not understood changes nothing", KEYS, "test_a_spoiled_file_keeps_the_keys_before"),
    ("`--api-key KEY` works and warns", "unit/serve/test_cli.py", "test_a_start_warns_of_keys"),
    ("Keys under 16 characters are warned of", KEYS, "test_an_operator_is_told_of_short_and_expired_keys"),
    (
        "Words it does not know are refused by the line's number",
        KEYS,
        "test_a_line_that_is_not_understood_is_named_and_not_repeated",
    ),
    ("the last day (UTC) that it is good for", KEYS, "test_attributes"),
    ("reads `/metrics`, `/version` and `/v1/models`, and asks no model", KEYS, "test_a_scope_opens_some_routes"),
    ("`/v1/models` lists no others", ATTRIBUTES, "test_models_that_a_key_is_not_for_are_not_listed"),
    ("then 429 `tokens`", ATTRIBUTES, "test_a_spent_budget"),
    ("also those of answers whose client left", ATTRIBUTES, "test_who_leaves_has_used_what_was_sent"),
    ("Keys of one name share rates and tokens", USAGE, "test_a_budget_is_a_days_and_a_names"),
    ("`traceparent` and `tracestate` (as the standard has them)", REQUESTLOG, "test_what_is_no_trace_is_left_out"),
    ("though not to pages in its browser", PLAY, "test_the_page_of_a_server_without_keys_goes_by_its_own_names"),
]


@cache
def guide() -> str:
    return " ".join((DOCS / "security.md").read_text("utf-8").split())


@pytest.mark.parametrize(("words", "file", "test"), PROMISES, ids=[f"{w[:40]} {t[5:45]}" for w, _, t in PROMISES])
def test_what_the_guide_promises_is_tested(words: str, file: str, test: str) -> None:
    assert words in guide()
    assert re.search(rf"^(async )?def {test}\(", (TESTS / file).read_text("utf-8"), re.MULTILINE)


def test_the_fields_of_the_guide_are_those_of_the_guard() -> None:
    """All that is taken is listed, and nothing is listed both as taken and as refused."""
    listed, _, refused = guide().partition("**Fields.** Taken:")[2].partition("Refused, among all others:")
    rows = re.findall(r"\| ([^|]+) \| [^|]+ \|", refused.partition("A field that is null")[0])
    taken = {word for word in re.findall(r"`([^`]+)`", listed) if not word.startswith("/")}
    given = {word for row in rows for word in re.findall(r"`([^`]+)`", row)}
    assert taken == CHAT_FIELDS | COMPLETION_FIELDS
    assert len(given) > 20 and not given & taken
