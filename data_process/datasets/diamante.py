"""Diamante (Baidu): open-domain small talk whose answers were chosen or written by people.

JSON lines of {"id", "conversation": [{"role": "speaker1" | "speaker2", "utterance",
"response_candidates"}]}. speaker1 begins and is the user; the candidates that were not chosen
are not read.
"""

from data_process.datasets.conversations import read
from data_process.registry import Source

__all__ = ["read"]

KIND = "chat"
SOURCE = Source(
    home="www.luge.ai (千言 Diamante)",
    rows="500 valid, 500 test; train not opened",
    manual="register at www.luge.ai, take the Diamante data set and put its JSON files there",
)
LICENSE = "terms of luge.ai"
