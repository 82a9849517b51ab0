"""Ask a server of `qvl serve` about an image, with OpenAI's own client (pip install openai).

    qvl serve out/demo-awq --port 8000 --detach
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=$QVL_API_KEY \\
        python examples/ask.py docs/images/shapes.png "How many shapes are in the picture?"

A server without keys takes any OPENAI_API_KEY.
"""

from __future__ import annotations

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI


def main(image: str, question: str) -> None:
    """Print the answer as it comes, then how many tokens it took."""
    client = OpenAI()
    model = client.models.list().data[0].id
    kind = mimetypes.guess_type(image)[0] or "image/png"
    data = base64.b64encode(Path(image).read_bytes()).decode()
    stream = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        temperature=0,
        max_tokens=256,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
        if chunk.usage:
            print(f"\n{model}: {chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} IMAGE QUESTION")
    main(*sys.argv[1:])
