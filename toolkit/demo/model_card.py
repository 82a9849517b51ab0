"""The model card of a demo checkpoint, made of its own training.json and accuracy.json so that it can't drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolkit.demo.record import ACCURACY, TRAINING, read_record
from toolkit.tasks import questions

__all__ = ["card", "write_card"]

_CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
tags: [qwen2_vl, synthetic]
---
<!-- Made by `python -m toolkit.demo.model_card` from training.json and accuracy.json. -->

# The embedded Qwen2-VL

A Qwen2-VL of {parameters:.1f} million parameters ({megabytes:.1f} MB in fp16), trained from nothing to answer
questions about drawn images. It ships with the toolkit so that quantizing, serving and benchmarking can be tried and
tested in minutes, on any machine, with a model that has quality to lose.

It is a true `Qwen2VLForConditionalGeneration`: the hub's file format and tensor names, m-rope, 2x2 patch merging and
images of any size. transformers and vLLM load it as they load its big siblings.

| part | |
|---|---|
| vision | {vision_layers} blocks {vision_width} wide, {vision_heads} heads, patches of {patch} px |
| language | {layers} layers {width} wide, {heads} query and {kv_heads} key heads, MLP {inner}, tied embeddings |
| tokenizer | the first {ranks:,} ranks of Qwen2's BPE and its special tokens: {vocabulary:,} ids |

## What it answers

Share of right answers to held-out questions: {asked} a task through transformers ({dtype}, processor and greedy
`generate`), and {fast_asked} other ones a task through the training code.

| task | for example | transformers | training code |
|---|---|---|---|
{rows}

An answer counts when its text is equal, for bars when its number is within 5%. Held-out images come from seeds of
their own; `unseen_words` shows only words that training never drew, `handwritten` only scans that it never saw.
What it got wrong is listed in accuracy.json.

## How it was made

- **Data:** {samples:,} questions, drawn while training by `toolkit/tasks/questions.py` with matplotlib's fonts, sides
of
  112 to 336 px. Real data are scikit-learn's `load_digits` (1,797 handwritten digits of 8x8 px, UCI) and a list of
  English words. Lists (shapes from left to right, all bars, spelling) and short texts without an image are trained
  on besides.
- **Recipe:** {steps:,} steps on answers only; Muon (rate {muon:g}) for matrices, AdamW ({adamw:g}) for the rest;
  {warmup} steps of warm-up, flat for {flat:.0%} of the time, then straight to zero; batches of up to {patches:,}
  patches; tasks are drawn more often the more they fail on questions with a seed of their own.
- **Seeds:** weights and questions {seed}; test while training {test_seed}; exam of the training code {final_seed};
  transformers' exam {evaluation_seed}. Training goes by the clock, so a second run gives a like model, not an
  equal one.
- **Time and device:** {minutes:.1f} minutes on {device}, torch {torch}. Measured through transformers {transformers}
  on {evaluation_device} in {evaluation_seconds:.0f} s.

## What it is for, and what not

For trying the toolkit, for tests, for seeing what quantization does to accuracy. Not for real images: it knows
photographs, documents and free conversation as little as any question of another form than those above. Nor do its
speeds tell about large models: its layers are too small for 4-bit weights to save time.

## Train it anew

`make demo-model` (`qvl demo-model --out DIR`) writes such a directory, this card included. On a GPU that takes
minutes; on a CPU it says after a few steps how long a full training would take, and stops after `--minutes`.
"""


def card(model: Path) -> str:
    """Return the text of ``model``'s README.md. Raises ``CheckpointError`` when a record or config.json is missing."""
    training, accuracy = read_record(model / TRAINING), read_record(model / ACCURACY)
    config = read_record(model / "config.json")
    vision, rates, seeds = config["vision_config"], training["rates"], training["seeds"]
    return _CARD.format(
        parameters=training["parameters"] / 1e6,
        megabytes=(model / "model.safetensors").stat().st_size / 1e6,
        vision_layers=vision["depth"],
        vision_width=vision["embed_dim"],
        vision_heads=vision["num_heads"],
        patch=vision["patch_size"],
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        inner=config["intermediate_size"],
        ranks=config["bos_token_id"],  # special tokens start where the ranks end
        vocabulary=config["vocab_size"],
        asked=_span(accuracy),
        fast_asked=_span(training),
        dtype=accuracy["dtype"],
        rows="\n".join(_row(task, training, accuracy) for task in questions.TASKS),
        samples=training["samples"],
        steps=training["steps"],
        muon=rates["muon"],
        adamw=rates["adamw"],
        warmup=rates["warmup_steps"],
        flat=rates["flat_share"],
        patches=training["batches"]["patches"],
        seed=seeds["train"],
        test_seed=seeds["test_while_training"],
        final_seed=seeds["final_test"],
        evaluation_seed=accuracy["seed"],
        minutes=training["seconds"] / 60,
        device=training["device"],
        torch=training["torch"],
        transformers=accuracy["transformers"],
        evaluation_device=accuracy["device"],
        evaluation_seconds=accuracy["seconds"],
    )


def _span(record: dict[str, Any]) -> str:
    """Return how many questions were asked a task."""
    counts = [record["questions"][task] for task in questions.TASKS]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _row(task: str, training: dict[str, Any], accuracy: dict[str, Any]) -> str:
    example = questions.question(task, "held-out", accuracy["seed"], 0)
    through, fast = accuracy["accuracy"][task], training["accuracy"][task]
    return f"| {task} | {example.question} *{example.answer}* | {through:.1%} | {fast:.1%} |"


def write_card(model: Path) -> Path:
    """Write README.md beside the weights; returns its path. Raises as :func:`card`."""
    path = model / "README.md"
    path.write_text(card(model), encoding="utf-8")
    return path
