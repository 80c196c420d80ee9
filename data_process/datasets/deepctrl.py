"""deepctrl-sft-data (匠数科技): 11 million Chinese instructions and dialogues from many sets.

JSON lines of {"instruction", "input", "output", "history": [[question, answer], …]} and notes
such as `data_source`. The question usually stands in `input`, with an empty `instruction`.

The lines are ordered by source, so that a run on a part of them sees few kinds of rows. Its
parts repeat BELLE 3.5M, ShareGPT and others: a mixture with those holds rows twice. Foreign
identities, refusals and rows that are not Chinese are left to clean.py.
"""

from data_process.datasets.instruction import read
from data_process.registry import Source

__all__ = ["read"]

KIND = "chat"
SOURCE = Source(
    home="modelscope.cn/datasets/deepctrl/deepctrl-sft-data",
    rows="11,381,621 (Chinese file)",
    modelscope="deepctrl/deepctrl-sft-data",
    files=("sft_data_zh.jsonl",),
)
LICENSE = "Apache-2.0; the parts keep their own"
