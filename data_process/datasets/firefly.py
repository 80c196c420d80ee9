"""Firefly: 1.65 million rows of 23 Chinese tasks, and dialogues for its training scripts.

JSON lines of {"kind", "input", "target"} (firefly-train-1.1M) or of
{"conversation": [{"human": "…", "assistant": "…"}]} (its copies of MOSS and others).
"""

from data_process.datasets.instruction import read
from data_process.registry import Source

__all__ = ["read"]

KIND = "chat"
SOURCE = Source(
    home="github.com/yangjianxin1/Firefly",
    rows="about 1.65 million",
    size="1.17 GB",
    huggingface="YeungNLP/firefly-train-1.1M",
    files=("firefly-train-1.1M.jsonl",),
)
LICENSE = "none stated"
