"""Boots Qwen2-VL checkpoints, fp16 or AWQ, under vLLM behind an OpenAI-compatible endpoint."""
