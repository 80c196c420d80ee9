"""Documents as JSON objects: SkyPile, C4-zh, seq-monkey, minimind's pretraining files, WuDao …

{"text": …}, {"content": …} or {"abst": …}; a "title" or "prefix" becomes the first line, unless
the text begins with it. Control strings of chat formats, with which older minimind files glue
samples, go.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "text"
SOURCE = Source(
    home='your own files of {"text": "…"}, one object a line or in a list',
    manual="put the files into the set's raw directory. Known to fit: Skywork/SkyPile-150B, "
    "jingyaogong/minimind_dataset (pretrain_*.jsonl) on Hugging Face; "
    "AI-ModelScope/SkyPile-150B, gongjy/minimind_dataset on ModelScope",
)
LICENSE = "that of the files"

BODIES = ("text", "content", "abst")
TITLES = ("title", "prefix")
CONTROL = re.compile(
    r"(?:(?:<\|im_start\|>(?:(?:system|user|assistant)\n)?|<\|(?:im_end|endoftext)\|>|</?s>|<unk>)\s*)+"
)


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One document an object."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    if not isinstance(record.data, dict):
        return Skip("not_json", record.where, str(record.data))
    text = next((record.data[key] for key in BODIES if key in record.data), None)
    title = next((record.data[key] for key in TITLES if record.data.get(key)), "")
    if not isinstance(text, str) or not isinstance(title, str):
        return Skip("wrong_type", record.where, str(record.data))
    text, title = CONTROL.sub("\n", text).strip(), title.strip()
    if not text:
        return Skip("empty_text", record.where, str(record.data), broken=False)
    return as_row(record, text=text if text.startswith(title) else f"{title}\n{text}")
