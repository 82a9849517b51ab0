"""A server's side: what it made of a chat, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from bench.load.endpoint import Endpoint, public_url
from bench.verify.samples import Asked
from toolkit.errors import BenchError, ServerError

__all__ = ["NEUTRAL", "TOP", "Served", "ask"]

#: Likeliest tokens whose log-probabilities are asked for; what vLLM gives without an option of its own.
TOP = 20
#: Sampling that is greedy whatever a server's defaults are.
NEUTRAL: dict[str, Any] = {
    "temperature": 0,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Served:
    """What a server answered to one chat."""

    #: The prompt's tokens as the model saw them, each image as many as it came to.
    prompt: list[int]
    #: Greedy tokens, with all of sampling set.
    tokens: list[int]
    #: Log-probabilities of the likeliest first tokens, in nats.
    first: dict[int, float]
    #: Tokens with the temperature set to 0 and everything else the server's default.
    default: list[int]


def ask(endpoint: Endpoint, asked: Asked, tokens: int) -> Served:
    """Ask a server twice: with all of sampling set, and with its own defaults.

    Raises:
        ServerError: it does not answer, refuses, or gives no token ids.
    """
    wanted = {"logprobs": True, "top_logprobs": TOP, "return_tokens_as_token_ids": True}
    neutral = _post(endpoint, asked, {**NEUTRAL, **wanted, "max_tokens": tokens})
    default = _post(endpoint, asked, {"temperature": 0, "max_tokens": tokens})
    choice = neutral["choices"][0]
    try:
        content = choice["logprobs"]["content"]
        first = (
            {_id(entry["token"]): float(entry["logprob"]) for entry in content[0]["top_logprobs"]} if content else {}
        )
        return Served(
            [int(token) for token in neutral["prompt_token_ids"]],
            [int(token) for token in choice["token_ids"]],
            first,
            [int(token) for token in default["choices"][0]["token_ids"]],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(
            f"{public_url(endpoint.url)} does not give token ids: verify needs vLLM's return_token_ids and logprobs "
            f"(is it vLLM, and nothing in between that drops fields? {type(error).__name__}: {error})"
        ) from error


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _post(endpoint: Endpoint, asked: Asked, settings: dict[str, Any]) -> dict[str, Any]:
    body = {"model": endpoint.model, "messages": asked.messages, "return_token_ids": True, **settings}
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    where = public_url(endpoint.url)
    try:
        with httpx.Client(timeout=_TIMEOUT_S, verify=_context(endpoint.url), headers=headers) as http:
            answer = http.post(f"{endpoint.url}/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        raise ServerError(f"{where} does not answer ({type(error).__name__}): {error}") from error
    if answer.status_code != 200:
        raise ServerError(f"{where} refuses {asked.where} (HTTP {answer.status_code}): {_said(answer)}")
    try:
        found: dict[str, Any] = answer.json()
    except ValueError as error:
        raise ServerError(f"{where} answers {asked.where} with something that is not JSON") from error
    if not isinstance(found, dict) or not found.get("choices"):
        raise BenchError(f"{where} answers {asked.where} without a choice")
    return found


def _context(url: str) -> Any:
    """Return what trusts the server: a certificate that `qvl serve` made on this machine, or the system's."""
    from serve.process.trust import context_for

    return (context_for(url) or True) if url.startswith("https:") else True


def _said(answer: httpx.Response) -> str:
    try:
        found = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        found = answer.text
    return str(found)[:300]
