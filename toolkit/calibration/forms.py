"""The forms of a sample that other tools write, brought to one: a list of messages.

- ms-swift, LLaMA-Factory: ``{"messages": [...], "images": [...]}``, each ``<image>`` in a text standing for the next
  image, ``<video>`` for the next of ``videos``; TRL's empty ``{"type": "image"}`` parts likewise
- ShareGPT, LLaVA: ``{"conversations": [{"from": "human", "value": "<image>..."}, ...], "image": "a.png"}``
- ms-swift's ``query``/``response`` and Alpaca's ``instruction``/``input``/``output``, both with ``history``

``system`` goes before the messages and ``id`` names a sample. Any other key is refused: what is not understood might
have mattered.
"""

from __future__ import annotations

import re
from typing import Any

from toolkit.errors import ManifestError

__all__ = ["messages_of", "refuse_unknown"]

_MARK = re.compile("<(image|video)>")
_EVERYWHERE = ("id", "system", "image", "images", "video", "videos")
#: The key that tells a form -> the keys that go with it.
_FORMS = {
    "messages": (),
    "conversations": (),
    "text": (),
    "query": ("response", "history"),
    "instruction": ("input", "output", "history"),
}
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def refuse_unknown(found: dict[str, Any], known: tuple[str, ...], what: str, where: str) -> None:
    """Raise ManifestError for the first key of ``found`` that is not in ``known``."""
    for key in found:
        if key not in known:
            raise ManifestError(f"{where}: {what} has a key that is not understood: {key!r}; take it out")


def messages_of(data: Any, where: str) -> list[Any]:
    """Return the messages of one line, whatever tool it was written for, each image and video in its place.

    Raises:
        ManifestError: the form is unknown, a key is not understood, or marks and media do not agree in number.
    """
    if isinstance(data, list):
        return _placed(data, {}, where)
    form = next((key for key in _FORMS if isinstance(data, dict) and key in data), None)
    if form is None:
        raise ManifestError(f"{where}: expected a non-empty 'messages' list (or a 'text' string)")
    refuse_unknown(data, (form, *_FORMS[form], *_EVERYWHERE), "the sample", where)
    messages = _messages(form, data, where)
    if data.get("system"):
        if not isinstance(data["system"], str):
            raise ManifestError(f"{where}: 'system' must be a text")
        messages = [{"role": "system", "content": data["system"]}, *messages]
    return _placed(messages, {kind: _media(data, kind, where) for kind in ("image", "video")}, where)


def _messages(form: str, data: dict[str, Any], where: str) -> list[Any]:
    if form == "messages":
        return _filled(data["messages"], "messages", where)
    if form == "conversations":
        return [_spoken(turn, where) for turn in _filled(data["conversations"], "conversations", where)]
    if form == "text":
        return [{"role": "user", "content": _text(data, "text", where)}]
    if form == "query":
        asked, answer = _text(data, "query", where), "response"
    else:
        pieces = [_text(data, key, where) for key in ("instruction", "input") if data.get(key)]
        asked, answer = "\n".join(pieces), "output"
    turns = [*_history(data.get("history"), where), asked]
    if data.get(answer) is not None:
        turns.append(_text(data, answer, where))
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]


def _filled(messages: Any, name: str, where: str) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise ManifestError(f"{where}: expected a non-empty {name!r} list (or a 'text' string)")
    return messages


def _text(data: dict[str, Any], key: str, where: str) -> str:
    text = data[key]
    if not isinstance(text, str):
        raise ManifestError(f"{where}: {key!r} must be a text")
    return text


def _spoken(turn: Any, where: str) -> dict[str, Any]:
    """Turn ShareGPT's from and value into role and content."""
    if not isinstance(turn, dict) or turn.get("from") not in _SPEAKERS or not isinstance(turn.get("value"), str):
        raise ManifestError(f"{where}: every turn needs a 'from' of {', '.join(_SPEAKERS)} and a 'value'")
    refuse_unknown(turn, ("from", "value"), "a turn", where)
    return {"role": _SPEAKERS[turn["from"]], "content": turn["value"]}


def _history(history: Any, where: str) -> list[str]:
    """Return earlier questions and answers in turn."""
    pairs = history or []
    whole = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    )
    if not whole:
        raise ManifestError(f"{where}: 'history' is a list of pairs, a question and its answer")
    return [text for pair in pairs for text in pair]


def _media(data: dict[str, Any], kind: str, where: str) -> list[Any]:
    """Return what ``image(s)`` or ``video(s)`` lists; a video may be a list of frames."""
    if data.get(kind) is not None and data.get(f"{kind}s") is not None:
        raise ManifestError(f"{where}: give either {kind!r} or '{kind}s'")
    found = data.get(f"{kind}s", data.get(kind))
    if found is None:
        return []
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list) or not all(
        isinstance(one, str) or (kind == "video" and isinstance(one, list)) for one in found
    ):
        raise ManifestError(f"{where}: '{kind}s' must be a list of paths or URLs")
    return found


def _placed(messages: list[Any], media: dict[str, list[Any]], where: str) -> list[Any]:
    """Put media where their marks stand; without any mark, before the first user's text, as ms-swift does."""
    left = {kind: list(found) for kind, found in media.items()}
    marks = {
        kind: sum(_marks(message, kind, any(media.values())) for message in messages) for kind in ("image", "video")
    }
    for kind, count in marks.items():
        given = len(left.get(kind, []))
        if count != given and (count or not given):
            raise ManifestError(
                f"{where}: {count} <{kind}> marks and {given} {kind}s: each mark stands for one of '{kind}s', in order"
            )
    unmarked = [
        {"type": kind, kind: left[kind].pop(0)}
        for kind in ("image", "video")
        if not marks[kind]
        for _ in media.get(kind, [])
    ]
    placed = []
    for message in messages:
        if isinstance(message, dict) and any(media.values()) and isinstance(message.get("content"), str | list):
            content = _parts(message["content"], left)
            if unmarked and message.get("role") == "user":
                content, unmarked = unmarked + content, []
            message = {**message, "content": content}
        placed.append(message)
    if unmarked:
        raise ManifestError(f"{where}: no user's message to show the images or videos with")
    return placed


def _marks(message: Any, kind: str, with_media: bool) -> int:
    """Count what in a message stands for an image or video listed beside it. Parts mean themselves where none is."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return content.count(f"<{kind}>")
    if not with_media or not isinstance(content, list):
        return 0
    parts = [part for part in content if isinstance(part, dict)]
    empty = sum(part == {"type": kind} for part in parts)
    texts = [text for part in parts if isinstance(text := part.get("text"), str)]
    return empty + sum(text.count(f"<{kind}>") for text in texts)


def _parts(content: str | list[Any], left: dict[str, list[Any]]) -> list[Any]:
    """Return the content's parts with every mark replaced by the next of ``left``, which is used up."""
    parts: list[Any] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if part in ({"type": "image"}, {"type": "video"}):
            parts.append({**part, part["type"]: left[part["type"]].pop(0)})
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and _MARK.search(part["text"]):
            pieces = _MARK.split(part["text"])
            for text, kind in zip(pieces[::2], [*pieces[1::2], None], strict=True):
                parts += [{**part, "text": text}] if text else []
                parts += [{"type": kind, kind: left[kind].pop(0)}] if kind else []
        else:
            parts.append(part)
    return parts
