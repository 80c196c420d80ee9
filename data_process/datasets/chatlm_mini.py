"""ChatLM-mini-Chinese: short questions from the web with their answers, {"prompt", "response"}."""

from data_process.datasets.instruction import read
from data_process.registry import Source

__all__ = ["read"]

KIND = "chat"
SOURCE = Source(
    home="github.com/charent/ChatLM-mini-Chinese",
    rows="3,000 / 1,000 / 2,000",
    manual="take data/my_{train_dataset_3k,valid_dataset_1k,test_dataset_2k}.parquet from the "
    "repository and write their rows as JSON lines (pandas: read_parquet, then to_json with "
    'orient="records", lines=True, force_ascii=False)',
)
LICENSE = "Apache-2.0"
