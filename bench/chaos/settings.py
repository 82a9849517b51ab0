"""What the long-running tests of a server are asked for; their command lines are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from toolkit.options import Option, Settings

__all__ = ["FaultsSettings", "SoakSettings"]


class FaultsSettings(Settings):
    """Of `bench.chaos.faults`."""

    out: Annotated[Path, Option("Directory for table.md and faults.json.")]
    model: Annotated[str, Option("Directory, hub id or demo.")] = "demo"
    only: Annotated[str, Option("Faults to bring about, with commas; all unless given.")] = ""


class SoakSettings(Settings):
    """Of `bench.chaos.soak`."""

    url: Annotated[str | None, Option("Root of the server; without, one with the embedded model is started.")] = None
    model: Annotated[str, Option("What requests call it.")] = "demo"
    api_key: Annotated[
        str | None, Option("What requests bring.", envvar="QVL_API_KEY", instead="the environment variable QVL_API_KEY")
    ] = None
    minutes: Annotated[float, Option("How long.")] = 30
    workers: Annotated[int, Option("Clients at one time.")] = 4
    pause: Annotated[float, Option("Mean seconds between a client's requests.")] = 0.2
    seed: Annotated[int, Option("Of the requests' order and content.")] = 0
    pid: Annotated[int | None, Option("The server's process, to watch its group's memory.")] = None
    out: Annotated[Path | None, Option("Directory for report.json and README.md.")] = None
