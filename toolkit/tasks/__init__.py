"""Drawn questions about images: the embedded model's tasks and calibration chats.

questions: one seeded generator a task. drawing, words: what it draws with. manifests: questions as JSONL and PNG files.
Needs PIL alone, and nothing of ours but errors and paths, so that everything else may stand on it.
"""
