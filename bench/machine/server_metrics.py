"""What a server says of itself at ``/metrics`` (Prometheus text, vLLM's names): cache hits, preemptions, queue, room.

Read before and after a point, never during it: writing the page takes the server some milliseconds. Counters run since
the server started, so a point's figures are differences, and requests that others send meanwhile are among them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

__all__ = ["DEFINITIONS", "ServerPoint", "Snapshot", "parse", "read"]

DEFINITIONS: dict[str, str] = {
    "prefix_cache": "Cached tokens = prompt tokens that the server took from its prefix cache / those it looked up "
    "there, by its own counters over the point; 0 but for what all chats begin with, or the load repeated itself.",
    "image_cache": "Cached images = images whose embedding the server had already / those it looked up, by its own "
    "counters over the point; must be 0.",
    "preemptions": "Preemptions = times a running request lost its KV-cache room to others and was computed anew "
    "later, by the server's counter over the point.",
    "queue_time": "Queue time = mean time that requests which ended during the point waited in the server before they "
    "were first scheduled.",
    "drafts": "Guessed tokens = tokens that a draft guessed and the model took / all that it guessed, by the server's "
    "counters over the point; behind it, tokens that a step of the model gave with them, 1 without a draft.",
    "kv_cache": "KV-cache room = tokens of all requests together that fit into the server's KV cache.",
}

#: Field of `Snapshot` -> sample of vLLM's page, summed over engines (data parallel) and labels.
COUNTERS = {
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "image_queries": "vllm:mm_cache_queries_total",
    "image_hits": "vllm:mm_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "output_tokens": "vllm:generation_tokens_total",
    "finished": "vllm:request_success_total",
    "queued": "vllm:request_queue_time_seconds_count",
    "queue_s": "vllm:request_queue_time_seconds_sum",
    "drafts": "vllm:spec_decode_num_drafts_total",
    "guessed": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "probes": "qvl_probe_seconds_count",
}
CACHE = "vllm:cache_config_info"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading of the page; None: the server has no such metric.

    Attributes:
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: those that were there.
        image_queries: images looked up in the cache of embeddings.
        image_hits: those that were there.
        preemptions: requests that lost their place and were computed anew.
        prompt_tokens: processed, cached ones too.
        output_tokens: generated.
        finished: requests that ended, for whatever reason.
        queued: requests whose time in the queue is in ``queue_s``.
        queue_s: seconds, summed over them.
        drafts: steps of a request that a draft guessed tokens for.
        guessed: tokens that it guessed.
        accepted: those that the model took.
        probes: questions about one and the same image that `qvl serve` asked itself; those before count them too.
        kv_blocks: of the KV cache, all of them.
        kv_tokens: that fit into it.
    """

    prefix_queries: float | None = None
    prefix_hits: float | None = None
    image_queries: float | None = None
    image_hits: float | None = None
    preemptions: float | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    finished: float | None = None
    queued: float | None = None
    queue_s: float | None = None
    drafts: float | None = None
    guessed: float | None = None
    accepted: float | None = None
    probes: float | None = None
    kv_blocks: int | None = None
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ServerPoint:
    """What a server counted between two readings; None: it has no such metric.

    Attributes:
        prefix_queries: prompt tokens looked up in the prefix cache.
        prefix_hits: those that were there.
        image_queries: images looked up in the cache of embeddings.
        image_hits: those that were there.
        preemptions: of requests.
        prompt_tokens: processed, cached ones too.
        output_tokens: generated.
        finished: requests that ended; more than were sent here were sent by others too.
        queue_mean_s: mean seconds in the queue of those that ended; None when none did.
        kv_blocks: of the KV cache.
        kv_tokens: that fit into it.
        drafts: steps of a request that a draft guessed tokens for.
        guessed: tokens that it guessed.
        accepted: those that the model took.
    """

    prefix_queries: int | None
    prefix_hits: int | None
    image_queries: int | None
    image_hits: int | None
    preemptions: int | None
    prompt_tokens: int | None
    output_tokens: int | None
    finished: int | None
    queue_mean_s: float | None
    kv_blocks: int | None
    kv_tokens: int | None
    drafts: int | None = None
    guessed: int | None = None
    accepted: int | None = None

    @classmethod
    def between(cls, before: Snapshot | None, after: Snapshot | None) -> ServerPoint | None:
        """Return what changed; None when either reading failed or the server started anew in between."""
        if before is None or after is None:
            return None
        changes: dict[str, float | None] = {}
        for name in COUNTERS:
            old, new = getattr(before, name), getattr(after, name)
            changes[name] = None if old is None or new is None else new - old
            if (change := changes[name]) is not None and change < 0:
                return None
        queued, queue_s = changes.pop("queued"), changes.pop("queue_s")
        # What the server asks itself while nobody else does is neither a request of others nor an image that was sent.
        probes = changes.pop("probes") or 0
        for name in ("finished", "image_queries", "image_hits"):
            if (change := changes[name]) is not None:
                changes[name] = max(0, change - probes)
        return cls(
            **{name: None if change is None else round(change) for name, change in changes.items()},
            queue_mean_s=queue_s / queued if queued and queue_s is not None else None,
            kv_blocks=after.kv_blocks,
            kv_tokens=after.kv_tokens,
        )


def parse(page: str) -> Snapshot | None:
    """Read a page; None when it is not Prometheus text or has nothing that is known here."""
    found: dict[str, list[Sample]] = defaultdict(list)
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                found[sample.name].append(sample)
    except (ValueError, IndexError):
        return None
    sums = {name: sum(s.value for s in found[metric]) for name, metric in COUNTERS.items() if found[metric]}
    blocks, tokens = _kv_cache(found[CACHE])
    snapshot = Snapshot(**sums, kv_blocks=blocks, kv_tokens=tokens)
    known = any(getattr(snapshot, field.name) is not None for field in fields(snapshot))
    return snapshot if known and all(math.isfinite(value) for value in sums.values()) else None


def _kv_cache(samples: Iterable[Sample]) -> tuple[int | None, int | None]:
    """Blocks and tokens of all engines' KV caches, from the labels of the gauge that holds their configuration."""
    blocks = tokens = 0
    for sample in samples:
        try:
            count = int(sample.labels["num_gpu_blocks"])
            blocks += count
            # Block sizes differ between a hybrid model's layers; recent servers do this sum themselves.
            tokens += int(sample.labels.get("kv_cache_size_tokens") or count * int(sample.labels["block_size"]))
        except (KeyError, ValueError):
            return None, None
    return blocks or None, tokens or None


async def read(http: httpx.AsyncClient) -> Snapshot | None:
    """Read ``/metrics`` through a client of `bench.load.endpoint.http_client`; None where there is none to read: no
    such
    page, a key that is refused, another kind of server, a server that is gone."""
    try:
        response = await http.get("/metrics", timeout=10.0)
    except (httpx.HTTPError, OSError):
        return None
    return parse(response.text) if response.status_code == 200 else None
