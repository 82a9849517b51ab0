"""What is asked, and how an answer is scored.

tasks reads questions with their images from a JSONL file or a directory; datasets makes such of DocVQA, ChartQA,
TextVQA and MMMU. observe asks a server for answers token by token, for drift from fp16. scoring grades an answer
against the right ones: exact, ANLS, VQA and the other metrics.
"""
