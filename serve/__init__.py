"""Boots Qwen2-VL checkpoints, fp16 or AWQ, under vLLM behind an OpenAI-compatible endpoint.

Rooms, from low to high; each imports only from those before it: settings (what was asked, limits, profiles), http
(errors, events, logs), compat (what is changed of uvicorn and vLLM), guard (what strangers may send), app (what runs
inside vLLM's process), process (start, supervise, stop), plan (what fits, `qvl plan`), page (the files of /play), then
ask and cli (`qvl ask`, `serve`, `status`, `stop`).
"""
