"""Known distributions make known divergences; what can't be scored is marked."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from bench.judge.fidelity import (
    DELTA_P_PERCENTILES,
    Drift,
    Fidelity,
    Item,
    Observed,
    _Clusters,
    compare,
    first_divergence,
    items_from_images,
    items_from_questions,
    observe,
    truncated_kl,
)
from bench.load.endpoint import Endpoint
from bench.questions.observe import Observing
from bench.questions.tasks import ImageData, load_questions
from toolkit.errors import BenchError, MediaError

END = 0
#: What is likeliest, next and so on at a place of an answer: token id -> probability.
Chances = dict[int, float]


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@dataclass
class Toy:
    """A system whose tokens are characters, and what it expects at each place of an answer is given."""

    answer: Callable[[str], str]
    chances: Callable[[str, int, int], Chances]  # prompt, place, token that stands there
    vllm: bool = True  # has vLLM's fields
    strict: bool = False  # refuses fields that it does not know
    logprobs: bool = True
    max_top: int = 20
    split: Callable[[str], list[int]] = ids
    template: str = "U:"
    status: Callable[[str], int] = lambda prompt: 200
    finish: str = "stop"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0)
        try:
            return self._respond(json.loads(request.content))
        finally:
            self.in_flight -= 1

    def _respond(self, body: dict[str, Any]) -> httpx.Response:
        content = body["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        self.bodies.append(body)
        known = {"model", "temperature", "messages", "max_tokens", "logprobs"}
        if self.strict and not set(body) <= known:
            return httpx.Response(400, json={"error": {"message": "Unrecognized request argument"}})
        if body.get("prompt_logprobs", 0) > self.max_top:
            return httpx.Response(400, json={"error": {"message": f"greater than max allowed: {self.max_top}"}})
        if prompt != "Hello" and self.status(prompt) != 200:
            return httpx.Response(self.status(prompt), json={"error": {"message": "out of luck"}})
        opening = ids(f"{self.template}{prompt}|")
        last = body["messages"][-1]
        if last["role"] == "assistant":
            return httpx.Response(200, json=self._read(body, prompt, opening, last["content"]))
        text = "hi" if prompt == "Hello" else self.answer(prompt)
        tokens = [*ids(text), END][: body["max_tokens"]]
        choice: dict[str, Any] = {"message": {"content": text[: body["max_tokens"]]}, "finish_reason": self.finish}
        if self.logprobs and body.get("logprobs"):
            listed = [{"token": chr(token), "bytes": list(chr(token).encode()), "logprob": -0.1} for token in tokens]
            choice["logprobs"] = {"content": listed}
        answer: dict[str, Any] = {"choices": [choice]}
        if self.vllm and body.get("return_token_ids"):
            choice["token_ids"] = tokens
            answer["prompt_token_ids"] = opening
        return httpx.Response(200, json=answer)

    def _read(self, body: dict[str, Any], prompt: str, opening: list[int], text: str) -> dict[str, Any]:
        answer: dict[str, Any] = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}
        if not self.vllm or "prompt_logprobs" not in body:
            return answer
        assert body["add_generation_prompt"] is False and body["max_tokens"] == 1
        target = [*self.split(text), END]
        entries: list[Any] = [None] + [{str(token): {"logprob": -1.0}} for token in opening[1:]]
        for place, token in enumerate(target):
            chances = self.chances(prompt, place, token)
            top = sorted(chances, key=lambda each: -chances[each])[: body["prompt_logprobs"]]
            entries.append({str(t): {"logprob": math.log(chances[t]), "decoded_token": chr(t)} for t in {*top, token}})
        newline = ord("\n")
        return answer | {
            "prompt_token_ids": [*opening, *target, newline],
            "prompt_logprobs": [*entries, {str(newline): {"logprob": -3.0}}],
        }


def sure(p: float) -> Callable[[str, int, int], Chances]:
    """The token that stands there has chance p, one other the rest."""
    return lambda prompt, place, token: {token: p, 1: 1.0 - p}


def run(
    baseline: Toy,
    candidate: Toy,
    items: Sequence[Item],
    *,
    seed: int = 0,
    on_done: Callable[[], None] = lambda: None,
    **settings: Any,
) -> Fidelity:
    """Observe the baseline, the baseline again and the candidate, and compare them."""

    async def handle(request: httpx.Request) -> httpx.Response:
        return await (baseline if request.url.host == "before" else candidate)(request)

    how = Observing(**settings)

    async def look(host: str, reference: Observed | None) -> Observed:
        end, transport = Endpoint(f"http://{host}", "m"), httpx.MockTransport(handle)
        return await observe(end, items, how, reference=reference, on_done=on_done, transport=transport)

    async def main() -> Fidelity:
        first = await look("before", None)
        again = await look("before", first)
        return compare(items, first, await look("after", first), again, top_k=how.top_k, seed=seed)

    return asyncio.run(main())


def asks(count: int) -> list[Item]:
    return [Item(f"q{at}", f"prompt {at}") for at in range(count)]


def full_kl(p: Chances, q: Chances) -> float:
    return math.fsum(p[token] * math.log(p[token] / q[token]) for token in p)


# --- divergence -------------------------------------------------------------------------------------------------------


def logs(chances: Chances) -> dict[int, float]:
    return {token: math.log(chance) for token, chance in chances.items()}


def test_kl_over_tokens_that_are_all_listed_is_the_whole_kl() -> None:
    p, q = {1: 0.5, 2: 0.25, 3: 0.25}, {1: 0.25, 2: 0.5, 3: 0.25}
    kl, coverage = truncated_kl(logs(p), logs(q))
    assert kl == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert coverage == pytest.approx(1.0, abs=1e-5)
    assert truncated_kl(logs(p), logs(p)) == (0.0, coverage)


def test_what_one_of_them_does_not_list_is_one_bucket() -> None:
    before, after = logs({1: 0.6, 2: 0.3}), logs({1: 0.5, 3: 0.4})
    kl, coverage = truncated_kl(before, after)
    assert kl == pytest.approx(0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.5))
    assert coverage == pytest.approx(0.6)


def test_truncation_never_makes_a_divergence_larger_or_negative() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        size, k = int(rng.integers(2, 60)), int(rng.integers(1, 25))
        sharpness = float(rng.uniform(0.1, 8))
        p, q = (dict(enumerate(rng.dirichlet(np.full(size, 1 / sharpness)) + 1e-9)) for _ in range(2))
        p, q = ({token: chance / sum(side.values()) for token, chance in side.items()} for side in (p, q))
        token = int(rng.integers(size))
        listed = [
            {each: math.log(side[each]) for each in {*sorted(side, key=lambda t: -side[t])[:k], token}}
            for side in (p, q)
        ]
        kl, coverage = truncated_kl(*listed)
        assert 0.0 <= kl <= full_kl(p, q) + 1e-4
        assert 0.0 <= coverage <= 1.0


def test_rounding_of_a_sure_token_is_not_taken_for_drift() -> None:
    assert truncated_kl({1: 1e-7, 2: -16.0}, {1: -1e-7, 2: -16.1})[0] < 1e-6
    # vLLM writes -9999 for a probability of 0.
    kl, _ = truncated_kl({1: math.log(0.5), 2: math.log(0.5)}, {1: 0.0, 2: -9999.0})
    assert math.isfinite(kl) and kl > 100


def test_first_divergence() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 5, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2
    assert first_divergence([], [7]) == 0
    assert first_divergence([], []) is None


# --- all passes -------------------------------------------------------------------------------------------------------


def test_known_distributions_give_known_measures() -> None:
    baseline = Toy(lambda prompt: "abc", sure(0.9))
    candidate = Toy(lambda prompt: "abd", sure(0.6))
    found = run(baseline, candidate, asks(6))
    drift = found.candidate
    assert (drift.tokens, drift.scored, drift.answered) == (24, 6, 6)  # three letters and the end
    kl = full_kl({1: 0.9, 2: 0.1}, {1: 0.6, 2: 0.4})
    assert drift.mean_kl is not None and drift.mean_kl.value == pytest.approx(kl, abs=1e-5)
    assert drift.p99_kl is not None and drift.p99_kl.value == pytest.approx(kl, abs=1e-5)
    assert drift.perplexity is not None and drift.perplexity.value == pytest.approx(1 / 0.9)
    assert drift.perplexity_ratio is not None and drift.perplexity_ratio.value == pytest.approx(0.9 / 0.6)
    assert set(drift.delta_p) == set(DELTA_P_PERCENTILES)
    assert all(interval.value == pytest.approx(-0.3) for interval in drift.delta_p.values())
    assert drift.top1_agreement is not None and drift.top1_agreement.value == 1.0
    assert drift.top1_agreement.low == pytest.approx(0.61, abs=0.01)  # six clusters prove little
    assert drift.greedy == 1.0 and drift.coverage == pytest.approx(1.0, abs=1e-5)
    assert drift.identical is not None and drift.identical.value == 0.0
    assert drift.first_divergence is not None and drift.first_divergence.value == 2.0
    assert (found.missing, found.failed, found.prompts_differ) == ((), 0, 0)
    item = found.items[0]
    assert item.candidate and item.candidate.text == "abd" and item.mean_kl == pytest.approx(kl, abs=1e-5)
    assert [token.text for token in item.tokens] == ["a", "b", "c", chr(END)]

    noise = found.noise
    assert noise and noise.mean_kl and noise.mean_kl.value == 0.0 and noise.mean_kl.high == 0.0
    assert noise.identical and noise.identical.value == 1.0 and noise.first_divergence is None


def test_measures_are_over_tokens_not_over_items() -> None:
    lengths = {f"prompt {at}": at + 1 for at in range(8)}

    def chances(prompt: str, place: int, token: int) -> Chances:
        return {token: 0.4, 1: 0.6} if place == 0 else {token: 0.8, 1: 0.2}

    baseline = Toy(lambda prompt: "a" * lengths[prompt], sure(0.8))
    drift = run(baseline, Toy(lambda prompt: "a", chances), asks(8)).candidate
    tokens = sum(length + 1 for length in lengths.values())
    assert drift.tokens == tokens
    kl = full_kl({1: 0.8, 2: 0.2}, {1: 0.4, 2: 0.6}) * 8 / tokens
    assert drift.mean_kl is not None and drift.mean_kl.value == pytest.approx(kl, abs=1e-5)
    assert drift.mean_kl.low < kl < drift.mean_kl.high
    assert drift.top1_agreement is not None and drift.top1_agreement.value == pytest.approx(1 - 8 / tokens)
    assert drift.perplexity_ratio is not None
    assert drift.perplexity_ratio.value == pytest.approx(math.exp(8 / tokens * math.log(2)))
    assert drift.delta_p[1].value == pytest.approx(-0.4) and drift.delta_p[50].value == pytest.approx(0.0)


def test_one_answer_moves_the_mean_and_not_what_is_usual() -> None:
    """Of 120 answers one drifts a thousand times as far: the trimmed mean leaves it out, the geometric hardly moves."""

    def chances(prompt: str, place: int, token: int) -> Chances:
        return {token: 0.001, 1: 0.999} if prompt == "prompt 7" else {token: 0.85, 1: 0.15}

    baseline = Toy(lambda prompt: "ab", sure(0.9))
    drift = run(baseline, Toy(lambda prompt: "ab", chances), asks(120)).candidate
    usual = full_kl({1: 0.9, 2: 0.1}, {1: 0.85, 2: 0.15})
    assert drift.mean_kl and drift.trimmed_kl and drift.geometric_kl
    assert drift.mean_kl.value > 3 * usual
    assert drift.trimmed_kl.value == pytest.approx(usual, rel=1e-3)
    assert drift.geometric_kl.value == pytest.approx(usual, rel=0.1)
    width = [found.high / found.low for found in (drift.mean_kl, drift.geometric_kl)]
    assert width[1] < width[0]


def test_ties_for_the_likeliest_agree() -> None:
    baseline = Toy(lambda prompt: "a", lambda prompt, place, token: {token: 0.5, 1: 0.5})
    drift = run(baseline, Toy(lambda prompt: "a", sure(0.3)), asks(2)).candidate
    assert drift.top1_agreement is not None and drift.top1_agreement.value == 1.0


def test_a_baseline_that_would_not_say_again_what_it_said_is_seen() -> None:
    drift = run(Toy(lambda prompt: "a", sure(0.2)), Toy(lambda prompt: "a", sure(0.2)), asks(2)).candidate
    assert drift.greedy == 0.0


def test_what_is_asked() -> None:
    baseline, candidate = Toy(lambda prompt: "abcdef", sure(0.9)), Toy(lambda prompt: "xyz", sure(0.9))
    steps: list[None] = []
    found = run(baseline, candidate, asks(9), top_k=7, max_tokens=4, concurrency=2, on_done=lambda: steps.append(None))
    assert len(steps) == 27  # three passes
    assert 1 < max(baseline.most_in_flight, candidate.most_in_flight) <= 2
    asked = [body for body in candidate.bodies if body["messages"][0]["content"] != "Hello"]
    assert len(asked) == 18  # two an item
    assert all(body["temperature"] == 0 and "stream" not in body for body in asked)
    read = [body for body in asked if body["messages"][-1]["role"] == "assistant"]
    assert all(body["messages"][-1]["content"] == "abcd" and body["prompt_logprobs"] == 7 for body in read)
    assert all(body["max_tokens"] == 4 for body in asked if body not in read)
    assert found.top_k == 7 and found.candidate.tokens == 36  # cut answers have no end to score


def test_images_are_sent_before_the_prompt(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    toy = Toy(lambda prompt: "a", sure(0.9))
    run(toy, toy, items_from_images(tmp_path, "Which colour?"))
    content = toy.bodies[-1]["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,") and content[1]["text"] == "Which colour?"


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_other_tokens_than_were_generated_are_marked_and_not_scored() -> None:
    def split(text: str) -> list[int]:
        return [999] if text == "bad" else ids(text)

    baseline = Toy(lambda prompt: "bad" if prompt == "prompt 1" else "good", sure(0.9))
    found = run(baseline, Toy(lambda prompt: "good", sure(0.6), split=split), asks(3))
    assert found.failed == 1 and found.candidate.scored == 2 and found.candidate.tokens == 10
    assert found.items[1].failure == "candidate: read again, the answer's text makes other tokens than were generated"
    assert found.items[1].tokens == () and found.items[1].diverges_at == 0  # the answers can be compared all the same
    assert found.candidate.answered == 3
    assert found.noise and found.noise.scored == 3


def test_another_prompt_is_counted_but_scored() -> None:
    toy = Toy(lambda prompt: "a", sure(0.9))
    found = run(toy, replace(toy, template="User says:"), asks(3))
    assert found.prompts_differ == 3 and found.candidate.scored == 3 and found.failed == 0


def test_failed_requests_are_marked_and_never_scored() -> None:
    baseline = Toy(lambda prompt: "a", sure(0.9), status=lambda prompt: 500 if prompt == "prompt 0" else 200)
    candidate = Toy(lambda prompt: "a", sure(0.6), status=lambda prompt: 429 if prompt == "prompt 2" else 200)
    found = run(baseline, candidate, asks(4))
    assert [item.failure for item in found.items] == [
        "baseline: HTTP 500: out of luck",
        None,
        "candidate: HTTP 429: out of luck",
        None,
    ]
    assert found.failed == 2 and found.candidate.scored == found.candidate.answered == 2
    assert found.items[0].identical is None and found.items[2].identical is None
    assert found.noise and found.noise.scored == 3
    assert not any("prompt 0" in json.dumps(body) for body in candidate.bodies)  # nothing to compare it with


def test_a_server_that_is_down_leaves_nothing_to_score() -> None:
    class Down(Toy):
        async def __call__(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

    toy = Toy(lambda prompt: "a", sure(0.9))
    found = run(toy, Down(lambda prompt: "a", sure(0.9)), asks(3))
    assert found.failed == 3 and found.candidate == Drift()
    assert found.items[0].failure == "candidate: ConnectError: refused"


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"<html>", "not a chat completion"),
        (b"[]", "not a chat completion"),
        (b'{"choices": [{"message": {"content": 3}}]}', "not a text"),
        (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "abort"}]}', "broke its answer off"),
    ],
)
def test_nonsense_is_malformed(sent: bytes, said: str) -> None:
    class Nonsense(Toy):
        async def __call__(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=sent)

    toy = Toy(lambda prompt: "a", sure(0.9))
    found = run(toy, Nonsense(lambda prompt: "a", sure(0.9)), asks(1))
    assert found.items[0].failure and said in found.items[0].failure and found.candidate.answered == 0


def test_log_probabilities_that_are_none_are_malformed() -> None:
    toy = Toy(lambda prompt: "a", sure(0.9))
    found = run(toy, Toy(lambda prompt: "a", lambda prompt, place, token: {token: 5.0}), asks(1))
    assert found.items[0].failure and "no log-probabilities" in found.items[0].failure
    assert found.candidate.scored == 0


def test_an_image_that_vanished_is_marked(tmp_path: Path) -> None:
    gone = Item("gone", "?", (ImageData("image/png", "0", tmp_path / "gone.png"),))
    toy = Toy(lambda prompt: "a", sure(0.9))
    found = run(toy, toy, [gone, *asks(2)])
    assert found.items[0].failure and "vanished" in found.items[0].failure and found.candidate.scored == 2


# --- servers that can less --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_without_prompt_logprobs_the_answers_are_compared_and_the_rest_is_missing(strict: bool) -> None:
    other = Toy(lambda prompt: "abX", sure(0.9), vllm=False, strict=strict)
    found = run(Toy(lambda prompt: "abc", sure(0.9)), other, asks(3))
    drift = found.candidate
    assert drift.mean_kl is drift.perplexity_ratio is drift.top1_agreement is None and drift.delta_p == {}
    assert drift.first_divergence is not None and drift.first_divergence.value == 2.0
    assert found.failed == 0 and len(found.missing) == 1
    assert found.missing[0].startswith("KL, top-1 agreement, delta-p and perplexity: candidate: the server re")
    assert found.noise and found.noise.scored == 3


def test_without_tokens_answers_are_compared_as_texts() -> None:
    other = Toy(lambda prompt: "abc" if prompt == "prompt 1" else "no", sure(0.9), vllm=False, logprobs=False)
    found = run(Toy(lambda prompt: "abc", sure(0.9)), other, asks(4))
    assert found.candidate.identical and found.candidate.identical.value == 0.25
    assert found.candidate.first_divergence is None and len(found.missing) == 2


def test_a_server_that_lists_fewer_tokens_says_so() -> None:
    found = run(Toy(lambda prompt: "a", sure(0.9)), Toy(lambda prompt: "a", sure(0.9), max_top=5), asks(2))
    assert "prompt_logprobs=20" in found.missing[0] and "max allowed: 5" in found.missing[0]
    few = Toy(lambda prompt: "a", sure(0.9), max_top=5)
    assert run(few, few, asks(2), top_k=5).missing == ()


def test_settings_that_make_no_sense() -> None:
    toy = Toy(lambda prompt: "a", sure(0.9))
    with pytest.raises(BenchError, match="nothing to ask"):
        run(toy, toy, [])
    with pytest.raises(BenchError, match="same id"):
        run(toy, toy, asks(1) * 2)
    with pytest.raises(BenchError, match="top_k 0"):
        run(toy, toy, asks(1), top_k=0)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_quantiles_are_those_of_the_values_and_intervals_hold_them() -> None:
    rng = np.random.default_rng(1)
    for size in (1, 2, 7, 100, 431):
        values = rng.exponential(size=size)
        levels = [0.01, 0.5, 0.99]
        found = _Clusters([str(at // 3) for at in range(size)], seed=0).quantiles(values, levels)
        expected = np.quantile(values, levels, method="inverted_cdf")
        assert [interval.value for interval in found] == pytest.approx(list(expected))
        assert all(interval.low <= interval.value <= interval.high for interval in found)


def test_intervals_cover_what_they_promise() -> None:
    rng, hits, trials = random.Random(2), 0, 200
    for trial in range(trials):
        names, values = [], []
        for cluster in range(25):
            shift = rng.gauss(0, 1)
            for _ in range(rng.randint(1, 6)):
                names.append(str(cluster))
                values.append(shift + rng.gauss(0, 0.5))
        interval = _Clusters(names, seed=trial).mean(np.array(values))
        hits += interval.low <= 0 <= interval.high
    assert 0.90 <= hits / trials <= 0.99


def test_the_same_seed_gives_the_same_intervals() -> None:
    def chances(prompt: str, place: int, token: int) -> Chances:
        return {token: 0.5 + 0.4 * random.Random(prompt).random(), 1: 0.05}

    found = [run(Toy(str, sure(0.9)), Toy(str, chances), asks(12), seed=seed).candidate for seed in (3, 3, 4)]
    assert found[0] == found[1] and found[0].mean_kl != found[2].mean_kl


def test_items_of_a_cluster_are_drawn_together() -> None:
    def chances(prompt: str, place: int, token: int) -> Chances:
        return {token: 0.3 if prompt in (f"prompt {at}" for at in range(6)) else 0.85, 1: 0.05}

    alone = asks(24)
    shared = [replace(item, cluster=str(at // 6)) for at, item in enumerate(alone)]
    widths = []
    for items in (alone, shared):
        interval = run(Toy(lambda prompt: "a", sure(0.9)), Toy(lambda prompt: "a", chances), items).candidate.mean_kl
        assert interval is not None
        widths.append(interval.high - interval.low)
    assert widths[1] > 1.5 * widths[0]


# --- items ------------------------------------------------------------------------------------------------------------


def test_images_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name, colour in (("z.PNG", "red"), ("b/deep/y.webp", "blue"), ("b/x.jpeg", "green"), ("a.jpg", "white")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._z.png").write_bytes(b"\0\5")  # what macOS leaves on other file systems
    items = items_from_images(tmp_path, "What?")
    assert [item.id for item in items] == ["a.jpg", "b/deep/y.webp", "b/x.jpeg", "z.PNG"]
    assert {item.text for item in items} == {"What?"} and len({item.cluster for item in items}) == 4
    assert items[1].images[0].data_url().startswith("data:image/webp;base64,")


def test_directories_that_hold_no_images(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such directory"):
        items_from_images(tmp_path / "nowhere")
    with pytest.raises(MediaError, match="no images in it"):
        items_from_images(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "ok.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "ok.png").read_bytes()[:60])
    with pytest.raises(MediaError, match=r"cut\.png is a truncated"):
        items_from_images(tmp_path)
    (tmp_path / "cut.png").write_text("text")
    with pytest.raises(MediaError, match=r"cut\.png is not an image"):
        items_from_images(tmp_path)


def test_questions_keep_what_is_asked_and_what_they_share(tmp_path: Path) -> None:
    line = {"task": "t", "question": "Why?", "answers": ["x"], "images": [], "cluster": "page 1"}
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(line | {"id": name}) for name in ("a", "b")))
    items = items_from_questions(load_questions(tmp_path / "q.jsonl"))
    assert [(item.id, item.text, item.cluster) for item in items] == [
        ("a", "Why?", "page 1"),
        ("b", "Why?", "page 1"),
    ]
