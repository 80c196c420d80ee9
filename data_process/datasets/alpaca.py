"""Alpaca in Chinese: 48,818 instructions answered by GPT-4, and translations of the first Alpaca.

A JSON list (or lines) of {"instruction", "input", "output"}. One input in a hundred only says
that there is none ("无输入"), which the reader of instructions takes as empty.
"""

from data_process.datasets.instruction import read
from data_process.registry import Source

__all__ = ["read"]

KIND = "chat"
SOURCE = Source(
    home="github.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM",
    rows="48,818",
    size="35 MB",
    huggingface="shibing624/alpaca-zh",
    modelscope="llamafactory/alpaca_gpt4_zh",
    files=("*.json",),
    urls=(
        "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/HEAD/data/alpaca_gpt4_data_zh.json",
    ),
)
LICENSE = "CC BY-NC 4.0"
