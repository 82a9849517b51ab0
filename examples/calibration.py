"""Calibrate on your own images: write a manifest from a folder of images and a CSV of questions, and quantize with it.

    python examples/calibration.py                                  # draws its own images first
    python examples/calibration.py --images scans --questions questions.csv --model Qwen/Qwen2-VL-2B-Instruct

The CSV has the columns image, question, answer. Answers matter: the tokens that a model writes
pass through its layers too.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from toolkit import quantize


def draw(folder: Path) -> Path:
    """Draw a few images of coloured squares and write the questions about them; return the CSV."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, colour in enumerate(("red", "green", "blue", "yellow") * 2, start=1):
        image = Image.new("RGB", (112, 112), "white")
        for place in range(number % 3 + 1):
            ImageDraw.Draw(image).rectangle([8 + 34 * place, 40, 34 + 34 * place, 66], fill=colour)
        image.save(folder / f"{number}.png")
        rows.append([f"{number}.png", "How many squares are in the picture?", str(number % 3 + 1)])
    questions = folder / "questions.csv"
    with questions.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answer"], *rows])
    return questions


def manifest(images: Path, questions: Path, out: Path) -> int:
    """Write a chat a line to ``out``; image paths are relative to it. Return how many."""
    with questions.open(newline="") as file:
        rows = list(csv.DictReader(file))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for row in rows:
            asked = [
                {"type": "image", "image": str((images / row["image"]).resolve())},
                {"type": "text", "text": row["question"]},
            ]
            chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["answer"]}]
            file.write(json.dumps({"messages": chat}) + "\n")
    return len(rows)


def main() -> None:
    """Write the manifest, quantize with it, and say what the model was shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images; without it a few are drawn")
    parser.add_argument("--questions", type=Path, help="CSV: image, question, answer")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=Path("out/example-calibrated"))
    asked = parser.parse_args()

    images = asked.images or asked.out.with_name(f"{asked.out.name}-images")
    questions = asked.questions or draw(images)
    chats = asked.out.with_name(f"{asked.out.name}.jsonl")
    count = manifest(images, questions, chats)

    quantize(asked.model, asked.out, calib=str(chats), samples=count, force=True)
    shown = json.loads((asked.out / "qvl.json").read_text())["calibration"]
    print(f"{shown['samples']} samples, {shown['tokens']} tokens, {shown['vision_tokens']} of them of images")


if __name__ == "__main__":
    main()
