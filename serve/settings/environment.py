"""The environment variables of a server, by name: who writes each, and who reads it.

`qvl serve` hands vLLM's process its settings this way: other users of the machine can't read an environment, as they
can a command line. A deployment without `qvl serve` (deploy/) writes the same variables itself.

| constant     | written by               | read by                                                             |
|--------------|--------------------------|---------------------------------------------------------------------|
| READY        | process/launch           | app/ready: `serve.settings.ready.ReadySettings` as JSON             |
| GUARD        | process/launch           | guard/app, app/play: `serve.settings.limits.Limits` as JSON         |
| PLAY         | process/launch           | app/play: `serve.settings.play.PlayOptions` as JSON                 |
| RECORD       | process/launch           | guard/recorder: `serve.settings.recording.Recording` as JSON        |
| REQUEST_LOG  | process/launch           | app/requestlog: "1" turns the lines on                              |
| LOG_FORMAT   | process/launch           | app/server: "json", or absent for text                              |
| DIE_WITH     | process/launch           | app/server: id of the process that the server must not outlive      |
| VLLM_API_KEY | the user, process/launch | settings/config, app/probe, vLLM                                    |
| KERNELS      | the user, process/launch | kernels/plugin: "on" puts our kernel before vLLM's own              |
| BACKEND      | the user                 | settings/backend: "cpu" or "gpu"                                    |
| API_KEY      | the user                 | settings/config, settings/ask: the key of `qvl serve` and `qvl ask` |
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "API_KEY",
    "BACKEND",
    "DIE_WITH",
    "GUARD",
    "KERNELS",
    "LOG_FORMAT",
    "PLAY",
    "READY",
    "RECORD",
    "REQUEST_LOG",
    "VLLM_API_KEY",
]

READY: Final = "QVL_READY"
GUARD: Final = "QVL_GUARD"
PLAY: Final = "QVL_PLAY"
RECORD: Final = "QVL_RECORD"
REQUEST_LOG: Final = "QVL_REQUEST_LOG"
LOG_FORMAT: Final = "QVL_LOG_FORMAT"
DIE_WITH: Final = "QVL_DIE_WITH"
VLLM_API_KEY: Final = "VLLM_API_KEY"
KERNELS: Final = "QVL_KERNELS"
BACKEND: Final = "QVL_BACKEND"
API_KEY: Final = "QVL_API_KEY"
