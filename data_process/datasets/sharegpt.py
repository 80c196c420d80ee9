"""ShareGPT: dialogues that users shared with ChatGPT, in Chinese or translated.

{"conversations": [{"from": "human" | "gpt" | "system", "value": "…"}]} or, in shareAI's files,
{"conversation": [{"human": "…", "assistant": "…"}]}; lists or lines. <think>…</think> and
personas are taken out by clean.py.
"""

from data_process.datasets.conversations import read
from data_process.registry import Source

__all__ = ["read"]

KIND = "chat"
SOURCE = Source(
    home="huggingface.co/datasets/shareAI/ShareGPT-Chinese-English-90k",
    rows="about 90,000, Chinese and English",
    huggingface="shareAI/ShareGPT-Chinese-English-90k",
    files=("sharegpt_jsonl/common_zh_70k.jsonl",),
)
LICENSE = "Apache-2.0"
